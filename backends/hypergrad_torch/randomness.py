"""Torch's default generators: read, replayed and put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """State of torch's generators: the CPU's, and those of the CUDA devices if any is in use."""

    cpu: Tensor
    cuda: tuple[Tensor, ...] = ()


class Trace:
    """What a compiler's trace is told: did a block ask for the draws of an earlier one?"""

    replayed = False


class _Current(threading.local):
    trace: Trace | None = None


_current = _Current()


@contextmanager
def tracing() -> Iterator[Trace]:
    """A block in which generators are left alone, since a compiled program has one of its own."""
    _current.trace = trace = Trace()
    try:
        yield trace
    finally:
        _current.trace = None


def generator(seed: int | None = None) -> Draws:
    """The state as it is now, or as the seed makes it."""
    if _current.trace is not None:
        return Draws(torch.empty(0))
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if seed is None:
        return Draws(torch.get_rng_state(), tuple(torch.cuda.get_rng_state_all()) if cuda else ())
    count = torch.cuda.device_count() if cuda else 0
    return Draws(
        torch.Generator().manual_seed(seed).get_state(),
        tuple(torch.Generator(f"cuda:{i}").manual_seed(seed).get_state() for i in range(count)),
    )


@contextmanager
def replay(draws: Draws) -> Iterator[None]:
    """A block that draws from this state, and leaves the generators as it found them."""
    if _current.trace is not None:
        _current.trace.replayed = True
        yield
        return
    found = generator()
    restore(draws)
    try:
        yield
    finally:
        restore(found)


def restore(draws: Draws) -> None:
    """Put the generators into this state."""
    if _current.trace is not None:
        return
    torch.set_rng_state(draws.cpu)
    if draws.cuda:
        torch.cuda.set_rng_state_all(draws.cuda)
