"""Torch's default generators: their state, read, restored and replayed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad.backend.random import Random


class Draws(NamedTuple):
    """State of torch's generators: the CPU's, and those of the CUDA devices if any is in use."""

    cpu: Tensor
    cuda: tuple[Tensor, ...] = ()


class Trace:
    """A trace of a compiler, during which generators are left alone."""

    replayed = False
    """Did a block ask for the draws of an earlier block?"""


class _Current(threading.local):
    trace: Trace | None = None


_current = _Current()


@contextmanager
def tracing() -> Iterator[Trace]:
    """Inside this block generators are neither read nor restored: a compiled program has its own."""
    _current.trace = trace = Trace()
    try:
        yield trace
    finally:
        _current.trace = None


class Generators(Random):
    """Torch's default generators, of the CPU and of every CUDA device in use."""

    def state(self, seed: int | None = None) -> Draws:
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

    def restore(self, state: Draws) -> None:
        if _current.trace is not None:
            return
        torch.set_rng_state(state.cpu)
        if state.cuda:
            torch.cuda.set_rng_state_all(state.cuda)

    @contextmanager
    def replay(self, state: Draws) -> Iterator[None]:
        if _current.trace is not None:
            _current.trace.replayed = True
            yield
            return
        with super().replay(state):
            yield


generators = Generators(None)
"""Those of this process."""
