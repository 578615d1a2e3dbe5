"""Slate: an array framework in one file, whose derivatives come from tapes.

An `Array` is a value and knows of no derivative. A `Tape` watches some arrays; while it is open it writes
down every operation on an array that it watches, and watches the result. Reading the list backwards pulls
cotangents back. Several tapes may be open, and each writes its own list, so a derivative that is taken
while another tape is open is one more computation for that tape to write down: derivatives nest.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import numpy as np


class NoDerivative(NotImplementedError):
    """This operation has no derivative."""


class _Open(threading.local):
    def __init__(self) -> None:
        self.tapes: list[Tape] = []


_open = _Open()


class Entry(NamedTuple):
    """A line of a tape: the result of an operation, its arguments, and what pulls back through it."""

    out: Array
    args: tuple[Any, ...]
    pull: Callable[[Array], Sequence[Any]]


class Tape:
    """Writes down the operations on the arrays that it watches, while it is open in a ``with`` block."""

    def __init__(self, watched: Iterable[Array]) -> None:
        self.entries: list[Entry] = []
        self._watched = {id(x): x for x in watched}

    def __enter__(self) -> Tape:
        _open.tapes.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _open.tapes.remove(self)

    def watches(self, x: Any) -> bool:
        """Has this array been written down, or was it to be watched?"""
        return isinstance(x, Array) and id(x) in self._watched

    def record(self, entry: Entry) -> None:
        """Write down an operation if one of its arguments is watched."""
        if any(map(self.watches, entry.args)):
            self.entries.append(entry)
            self._watched[id(entry.out)] = entry.out

    def backward(self, outputs: Sequence[Array], cotangents: Sequence[Array]) -> Callable[[Array], Any]:
        """Pull cotangents back. Returns a function of an array: its cotangent, or ``None`` if it has none."""
        slopes: dict[int, Array] = {}

        def add(x: Array, g: Array) -> None:
            g = _fit(g, x)
            slopes[id(x)] = slopes[id(x)] + g if id(x) in slopes else g

        for out, g in zip(outputs, cotangents, strict=True):
            if self.watches(out):
                add(out, array(g))
        for entry in reversed(self.entries):
            if (g := slopes.pop(id(entry.out), None)) is not None:
                for x, slope in zip(entry.args, entry.pull(g), strict=True):
                    if self.watches(x):
                        add(x, slope)
        return lambda x: slopes.get(id(x))

    def origins(self, outputs: Sequence[Array]) -> Callable[[Array], bool]:
        """A function of an array: do the outputs depend on it?"""
        needed = {id(x) for x in outputs if self.watches(x)}
        for entry in reversed(self.entries):
            if id(entry.out) in needed:
                needed.update(id(x) for x in entry.args if self.watches(x))
        return lambda x: id(x) in needed

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on the tape."""
        arrays = {
            id(x): x for entry in self.entries for x in (entry.out, *entry.args) if isinstance(x, Array)
        }
        return builtins.sum(x.data.nbytes for x in arrays.values())


def is_watched(x: Any) -> bool:
    """Does an open tape watch this array?"""
    return any(tape.watches(x) for tape in _open.tapes)


def _raw(x: Any) -> Any:
    return x.data if isinstance(x, Array) else x


def operation(f: Callable[..., tuple[Any, Any]]) -> Callable[..., Array]:
    """An operation, from a function that returns NumPy's result and what pulls back (``None``: constant)."""

    @wraps(f)
    def apply(*args: Any, **options: Any) -> Array:
        data, pull = f(*args, **options)
        out = Array(np.asarray(data))
        if pull is not None and out.dtype.kind == "f":
            for tape in _open.tapes:
                tape.record(Entry(out, args, pull))
        return out

    return apply


def _constant(f: Callable[..., Any]) -> Callable[..., Array]:
    return operation(lambda *args, **options: (f(*map(_raw, args), **options), None))


def _elementwise(
    f: Callable[..., Any], pull: Callable[..., Callable[[Array], Sequence[Any]]]
) -> Callable[..., Array]:
    return operation(lambda *args: (f(*map(_raw, args)), pull(*args)))


def _fit(g: Array, x: Array) -> Array:
    """Undo broadcasting and promotion: a cotangent in the shape and the dtype of x."""
    while g.ndim > x.ndim:
        g = sum(g, axis=0)
    for axis, n in enumerate(x.shape):
        if n == 1 != g.shape[axis]:
            g = sum(g, axis=axis, keepdims=True)
    return g if g.dtype == x.dtype else convert(g, dtype=x.dtype)


# Element by element.

add = _elementwise(np.add, lambda x, y: lambda g: (g, g))
subtract = _elementwise(np.subtract, lambda x, y: lambda g: (g, -g))
multiply = _elementwise(np.multiply, lambda x, y: lambda g: (g * y, g * x))
divide = _elementwise(np.divide, lambda x, y: lambda g: (g / y, -g * x / (y * y)))
power = _elementwise(np.power, lambda x, n: lambda g: (g * n * x ** (n - 1), None))
negative = _elementwise(np.negative, lambda x: lambda g: (-g,))
exp = _elementwise(np.exp, lambda x: lambda g: (g * exp(x),))
expm1 = _elementwise(np.expm1, lambda x: lambda g: (g * exp(x),))
log = _elementwise(np.log, lambda x: lambda g: (g / x,))
log1p = _elementwise(np.log1p, lambda x: lambda g: (g / (1.0 + x),))
root = _elementwise(np.sqrt, lambda x: lambda g: (0.5 * g / root(x),))
tanh = _elementwise(np.tanh, lambda x: lambda g: (g * (1.0 - tanh(x) ** 2),))
absolute = _elementwise(np.abs, lambda x: lambda g: (g * sign(x),))
select = _elementwise(np.where, lambda c, x, y: lambda g: (None, select(c, g, 0.0), select(c, 0.0, g)))
larger = _elementwise(np.maximum, lambda x, y: lambda g: (select(x >= y, g, 0.0), select(x >= y, 0.0, g)))
smaller = _elementwise(np.minimum, lambda x, y: lambda g: (select(x <= y, g, 0.0), select(x <= y, 0.0, g)))
sign, isfinite, round = _constant(np.sign), _constant(np.isfinite), _constant(np.round)
zeros_like, ones_like = _constant(np.zeros_like), _constant(np.ones_like)


# Shapes, dtypes, reductions.


def array(x: Any, dtype: Any = None) -> Array:
    """Copy NumPy values into an array; an array stays as it is."""
    return x if isinstance(x, Array) else Array(np.array(x, dtype))


@operation
def alias(x: Any) -> Any:
    """The same values as an array of its own."""
    return _raw(x), lambda g: (g,)


@operation
def convert(x: Any, *, dtype: Any) -> Any:
    """The values in another dtype."""
    return x.data.astype(dtype), lambda g: (g,)


@operation
def reshape(x: Any, *, shape: Any) -> Any:
    """The values in another shape."""
    return x.data.reshape(shape), lambda g: (reshape(g, shape=x.shape),)


@operation
def transpose(x: Any) -> Any:
    """The axes in reverse."""
    return x.data.T, lambda g: (transpose(g),)


@operation
def _index(x: Any, *, key: Any) -> Any:
    return x.data[key], lambda g: (_scatter(g, key=key, shape=x.shape),)


@operation
def _scatter(x: Any, *, key: Any, shape: Any) -> Any:
    out = np.zeros(shape, x.dtype)
    np.add.at(out, key, x.data)
    return out, lambda g: (_index(g, key=key),)


@operation
def _join(*arrays: Any) -> Any:
    ends = np.cumsum([0, *(len(x.data) for x in arrays)])
    return np.concatenate([x.data for x in arrays]), lambda g: [
        g[i:j] for i, j in zip(ends, ends[1:], strict=False)
    ]


def join(arrays: Sequence[Array]) -> Array:
    """Arrays one after the other, along the first axis."""
    return _join(*arrays)


def pile(arrays: Sequence[Array]) -> Array:
    """Arrays of one shape, along a new first axis."""
    return _join(*(reshape(x, shape=(1, *x.shape)) for x in arrays))


def _kept(x: Array, axis: int | None) -> tuple[int, ...]:
    """The shape with the axes that are reduced kept as 1."""
    return tuple(1 if axis is None or i == axis % x.ndim else n for i, n in enumerate(x.shape))


@operation
def sum(x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Sum over an axis or over all."""
    return x.data.sum(axis=axis, keepdims=keepdims), lambda g: (
        reshape(g, shape=_kept(x, axis)) * ones_like(x),
    )


def mean(x: Array, *, axis: int | None = None) -> Array:
    """Mean over an axis or over all."""
    return sum(x, axis=axis) / (x.data.size if axis is None else x.shape[axis])


def _extreme(f: Any, x: Array, axis: int | None, keepdims: bool) -> Any:
    out = f(x.data, axis=axis, keepdims=True)

    def pull(g: Array) -> Any:
        attained = x == out
        return (
            select(attained, reshape(g, shape=_kept(x, axis)) / sum(attained, axis=axis, keepdims=True), 0.0),
        )

    return (out if keepdims else f(x.data, axis=axis)), pull


@operation
def largest(x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """The largest entry, over an axis or over all."""
    return _extreme(np.max, x, axis, keepdims)


@operation
def smallest(x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """The smallest entry, over an axis or over all."""
    return _extreme(np.min, x, axis, keepdims)


every, some = _constant(np.all), _constant(np.any)


# Linear algebra.


@operation
def _matmul(a: Any, b: Any) -> Any:
    return a.data @ b.data, lambda g: (_matmul(g, transpose(b)), _matmul(transpose(a), g))


def matmul(a: Array, b: Array) -> Array:
    """The product of two matrices, or of a matrix and a vector."""
    rows = reshape(a, shape=(1, -1)) if a.ndim == 1 else a
    columns = reshape(b, shape=(-1, 1)) if b.ndim == 1 else b
    return reshape(_matmul(rows, columns), shape=(*a.shape[:-1], *b.shape[1:]))


def _underived(name: str) -> Callable[[Array], Any]:
    def pull(g: Array) -> Any:
        raise NoDerivative(name)

    return pull


def spectrum(a: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of a symmetric matrix. They have no derivative."""
    parts = np.linalg.eigh(a.data)
    values, vectors = (operation(lambda _, part=part: (part, _underived("spectrum")))(a) for part in parts)
    return values, vectors


def singular(a: Array, full: bool = True) -> tuple[Array, ...]:
    """Singular value decomposition u, s, vᵀ. It has no derivative."""
    parts = np.linalg.svd(a.data, full)
    return tuple(operation(lambda _, part=part: (part, _underived("singular")))(a) for part in parts)


# The array.


def _swapped(f: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, y: f(y, x)


class Array:
    """Values, and what can be computed with them."""

    __slots__ = ("data",)
    __array_ufunc__ = None  # NumPy's operators leave the work to ours
    __hash__ = object.__hash__

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    T = property(transpose)

    def __repr__(self) -> str:
        return f"slate.{self.data!r}"

    def __getitem__(self, key: Any) -> Array:
        return _index(self, key=key)

    def __float__(self) -> float:
        return float(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    __neg__ = negative
    __add__, __radd__ = add, _swapped(add)
    __sub__, __rsub__ = subtract, _swapped(subtract)
    __mul__, __rmul__ = multiply, _swapped(multiply)
    __truediv__, __rtruediv__ = divide, _swapped(divide)
    __matmul__, __pow__ = matmul, power
    __floordiv__, __mod__ = _constant(np.floor_divide), _constant(np.remainder)
    __lshift__, __rshift__ = _constant(np.left_shift), _constant(np.right_shift)
    __and__ = __rand__ = _constant(np.bitwise_and)
    __or__ = __ror__ = _constant(np.bitwise_or)
    __invert__ = _constant(np.invert)
    __eq__, __ne__ = _constant(np.equal), _constant(np.not_equal)  # type: ignore[assignment]
    __lt__, __le__ = _constant(np.less), _constant(np.less_equal)
    __gt__, __ge__ = _constant(np.greater), _constant(np.greater_equal)
