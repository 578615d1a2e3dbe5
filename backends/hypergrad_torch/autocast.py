"""Autocast holds inside of losses, and nowhere else in an estimate.

Solvers, norms, update rules and backward passes would otherwise run in half precision in part.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

_DEVICES = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps")))
"""Those that this torch knows: asking for another one is an error there."""


class _Ambient(threading.local):
    """The autocast modes of the caller: (device, dtype) of those that are on, ``None`` outside."""

    modes: tuple[tuple[str, torch.dtype], ...] | None = None


_ambient = _Ambient()


def without_autocast() -> AbstractContextManager[None]:
    """Return a context without autocast, in which `as_called` brings the present modes back."""
    modes = tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d))
    return _switched(modes) if modes else nullcontext()


def as_called() -> AbstractContextManager[None]:
    """Return a context with the modes that `without_autocast` has switched off."""
    return nullcontext() if not _ambient.modes else _modes(_ambient.modes)


def precision(dtype: torch.dtype) -> float:
    """Return the machine epsilon of losses on tensors of this dtype, in the present modes of the caller."""
    dtypes = [dtype, *(torch.get_autocast_dtype(d) for d in _DEVICES if torch.is_autocast_enabled(d))]
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@contextmanager
def full_precision() -> Iterator[None]:
    """Return a context without autocast, not even in losses."""
    before = _ambient.modes
    try:
        with without_autocast():
            _ambient.modes = ()  # so that `as_called` brings none back
            yield
    finally:
        _ambient.modes = before


@contextmanager
def _switched(modes: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    before, _ambient.modes = _ambient.modes, modes
    try:
        with ExitStack() as stack:
            for device, _ in modes:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _ambient.modes = before


@contextmanager
def _modes(modes: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for device, dtype in modes:
            stack.enter_context(torch.autocast(device, dtype))
        yield
