"""What functions hold: modules, optimisers, arrays and numbers in their closures, globals and arguments."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

_PLAIN = (bool, int, float, complex, str)
_OURS = ("hypergrad", "hypergrad_torch", "torch")
_MOST_LEVELS = 8
"""How deep functions and containers are searched."""


def reads_module(value: Any) -> bool:
    """Is this a module with tensors, or a function or container that holds one?"""
    return any(
        isinstance(part, nn.Module) and any(True for _ in (*part.parameters(), *part.buffers()))
        for part in held(value)
    )


def settings(value: Any) -> tuple[Hashable, ...]:
    """Everything that functions hold and that may change from call to call, as values to compare.

    Options of optimisers, train/eval mode of modules, arrays of NumPy and plain numbers.
    """
    return tuple(_setting(part) for part in held(value))


def held(value: Any) -> Iterator[Any]:
    """Yield a value and what it holds: each object once, and numbers as often as they are held."""
    seen: set[int] = set()

    def walk(value: Any, levels: int) -> Iterator[Any]:
        if isinstance(value, _PLAIN):  # equal numbers may be one object, in several places
            yield value
            return
        if id(value) in seen or levels == 0:
            return
        seen.add(id(value))
        yield value
        for part in _parts(value):
            yield from walk(part, levels - 1)

    return walk(value, _MOST_LEVELS)


def _setting(value: Any) -> Hashable:
    if isinstance(value, Optimizer):
        return tuple(
            (name, repr(option))
            for group in value.param_groups
            for name, option in group.items()
            if name != "params"
        )
    if isinstance(value, nn.Module):
        return tuple(part.training for part in value.modules())
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, _PLAIN):
        return repr(value)
    return None


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it holds nothing yet
                continue
        if value.__module__ is None or value.__module__.split(".")[0] not in _OURS:
            names = value.__code__.co_names
            yield from (value.__globals__[name] for name in names if name in value.__globals__)
        yield from value.__defaults__ or ()
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, tuple):
        yield from value
    elif isinstance(value, list):  # numbers in a list are a log more often than settings
        yield from (part for part in value if not isinstance(part, _PLAIN))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in fields(value))
