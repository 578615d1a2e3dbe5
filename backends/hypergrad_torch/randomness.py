"""Torch's default generators: their state, read, restored and replayed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.backend.random import Random


class Draws(NamedTuple):
    """State of torch's generators: the CPU's, and those of the other devices if any is in use."""

    cpu: Tensor
    devices: tuple[Tensor, ...] = ()


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


def _in_use() -> tuple[str, Any] | None:
    """Return the kind of accelerator that this process uses, if any, and torch's module for it.

    Torch makes generators of CUDA and XPU when such a device is first used, and that of MPS at once.
    """
    for kind in ("cuda", "xpu"):
        module: Any = getattr(torch, kind, None)
        if module is not None and module.is_initialized():
            return kind, module
    if torch.backends.mps.is_available() and torch.mps.driver_allocated_memory() > 0:
        return "mps", torch.mps
    return None


class Generators(Random):
    """Torch's default generators, of the CPU and of every device in use: CUDA, XPU or MPS."""

    def state(self, seed: int | None = None) -> Draws:
        if _current.trace is not None:
            return Draws(torch.empty(0))
        used = _in_use()
        if seed is None:
            return Draws(torch.get_rng_state(), () if used is None else _states(used[1]))
        cpu = torch.Generator().manual_seed(seed).get_state()
        if used is None:
            return Draws(cpu)
        kind, module = used
        devices = [f"{kind}:{i}" for i in range(module.device_count())]
        return Draws(cpu, tuple(torch.Generator(device).manual_seed(seed).get_state() for device in devices))

    def restore(self, state: Draws) -> None:
        if _current.trace is not None:
            return
        torch.set_rng_state(state.cpu)
        used = _in_use() if state.devices else None
        if used is None:
            return
        if hasattr(used[1], "set_rng_state_all"):
            used[1].set_rng_state_all(state.devices)
        else:
            used[1].set_rng_state(*state.devices)

    @contextmanager
    def replay(self, state: Draws) -> Iterator[None]:
        if _current.trace is not None:
            _current.trace.replayed = True
            yield
            return
        with super().replay(state):
            yield


def _states(module: Any) -> tuple[Tensor, ...]:
    return (
        tuple(module.get_rng_state_all())
        if hasattr(module, "get_rng_state_all")
        else (module.get_rng_state(),)
    )


generators = Generators(None)
"""Those of this process."""
