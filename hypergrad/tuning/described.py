"""What a value says of itself in JSON, and how two such descriptions differ: for the heads of checkpoints."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np

from hypergrad.backend import Backend

LARGEST_SHOWN = 16
"""Arrays with more entries than this are described by a hash of their values."""


def described(backend: Backend, value: Any) -> Any:
    """Describe a recipe, or a part of one, in the types of JSON.

    A composed value is described by its type and fields, an array by its numbers, and a function only as one:
    two functions cannot be compared. Other objects are described by their type.
    """

    def part(value: Any) -> Any:
        return described(backend, value)

    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if f.init]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        names = list(value._fields)
    elif isinstance(value, Mapping):
        return {str(key): part(entry) for key, entry in value.items()}
    elif isinstance(value, list | tuple):
        return {str(k): part(entry) for k, entry in enumerate(value)}
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(backend.to_numpy(value))
    else:
        return "a function" if callable(value) else type(value).__name__
    return {"type": type(value).__name__} | {name: part(getattr(value, name)) for name in names}


def _array(array: Any) -> Any:
    array = np.asarray(array)
    if array.size <= LARGEST_SHOWN:
        return f"{array.dtype.name} {np.array2string(array, floatmode='unique')}"
    digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
    return f"{array.dtype.name} {array.shape} {digest}"


def differences(stored: Any, here: Any) -> list[str]:
    """Return a line for each entry in which two descriptions differ, such as ``recipe.every: 5, here 10``."""
    old, new = dict(_entries(stored, "")), dict(_entries(here, ""))
    return [
        f"{path}: {_shown(old, path)}, here {_shown(new, path)}"
        for path in dict.fromkeys([*new, *old])
        if _shown(old, path) != _shown(new, path)
    ]


def _entries(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, entry in value.items():
        yield from _entries(entry, f"{path}.{key}" if path else key)


def _shown(entries: dict[str, Any], path: str) -> str:
    return repr(entries[path]) if path in entries else "nothing"
