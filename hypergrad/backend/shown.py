"""Short text for trees of arrays: shapes in place of long lists of numbers."""

from __future__ import annotations

from typing import Any

_MOST_NUMBERS, _MOST_ITEMS, _MOST_LEVELS = 4, 6, 4


def shown(value: Any) -> str:
    """Return the ``repr`` of a named tuple of trees, in a few lines at most.

    Arrays of more than four numbers are shown by dtype and shape, and containers by their first six items.
    """
    return _shown(value, _MOST_LEVELS)


def _shown(value: Any, levels: int) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        count = 1
        for n in value.shape:
            count *= n
        if count > _MOST_NUMBERS or not hasattr(value, "tolist"):
            return f"{_name(value.dtype)}{list(value.shape)}"
        try:
            numbers = value.tolist()
        except Exception:  # a traced array has none
            return f"{_name(value.dtype)}{list(value.shape)}"
        return _numbers(numbers)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        if levels == 0:
            return f"{type(value).__name__}(…)"
        parts = zip(value._fields, value, strict=True)
        texts = (f"{name}={_shown(part, levels - 1)}" for name, part in parts)
        return f"{type(value).__name__}({', '.join(texts)})"
    if isinstance(value, dict):
        entries = [f"{key!r}: {_shown(part, levels - 1)}" for key, part in _few(value.items())]
        return f"{{{_items(entries, value, levels)}}}"
    if isinstance(value, list | tuple):
        inside = _items([_shown(part, levels - 1) for part in _few(value)], value, levels)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _few(items: Any) -> list[Any]:
    return list(items)[:_MOST_ITEMS]


def _items(texts: list[str], whole: Any, levels: int) -> str:
    if levels <= 0 and whole:
        return "…"
    more = len(whole) - len(texts)
    return ", ".join([*texts, f"… {more} more"] if more else texts)


def _numbers(numbers: Any) -> str:
    if isinstance(numbers, list):
        return f"[{', '.join(map(_numbers, numbers))}]"
    return f"{numbers:.6g}" if isinstance(numbers, float) else repr(numbers)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
