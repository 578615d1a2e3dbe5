"""A pebble of an array framework: NumPy arrays with reverse-mode derivatives of any order.

It stands in for the framework of a third party. Each differentiation has a level of its own. An `Array`
of a level holds the `Array` of lower levels that it stands for and the `Node` that made it; an operation
peels off the highest level among its arguments, works on what is inside, and puts the result back. Rules
see the inner arrays, so a derivative is a computation like any other at the levels below, and what a
level returns no longer knows of it. Only a clock is shared, and it ticks atomically: threads never meet.
"""

from __future__ import annotations

import builtins
import itertools
import math
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, final

import numpy as np

_clock = itertools.count(1)


class NoDerivative(NotImplementedError):
    """This operation has no derivative."""


# The graph.


@final
@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One operation at one level: what it gave, what it took, and the rules that lead to its parents."""

    out: Array
    args: tuple[Any, ...] = ()
    static: dict[str, Any] = field(default_factory=dict)
    parents: tuple[tuple[Node, Callable[..., Array]], ...] = ()
    time: int = field(default_factory=lambda: next(_clock))


def new_level() -> int:
    """A level above all levels so far."""
    return next(_clock)


def variable(x: Any, level: int) -> Array:
    """The array by which a level differentiates."""
    x = asarray(x)
    return Array(x, level, Node(x))


def cut(x: Any, level: int) -> Any:
    """What x is outside of a level."""
    return x.value if isinstance(x, Array) and x.level == level else x


def history(ends: Iterable[Node]) -> list[Node]:
    """All nodes that lead to the ends, the newest first."""
    seen: set[Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.parents)
    return sorted(seen, key=lambda node: node.time, reverse=True)


def backward(nodes: Sequence[Node], cotangents: Iterable[tuple[Node, Any]]) -> dict[Node, Array]:
    """Carry the cotangents of the ends back through their history, to the nodes without parents."""
    slopes: dict[Node, Array] = {}

    def add(node: Node, g: Array) -> None:
        slopes[node] = slopes[node] + g if node in slopes else g

    for end, g in cotangents:
        g = asarray(g, end.out.dtype)
        if g.shape != end.out.shape:
            raise ValueError(f"a cotangent has shape {g.shape}, its output {end.out.shape}")
        add(end, g)
    for node in nodes:
        if node.parents:
            g = slopes.pop(node)
            for parent, rule in node.parents:
                add(parent, _fit(rule(g, node.out, *node.args, **node.static), parent.out))
    return slopes


def _fit(g: Array, x: Array) -> Array:
    """Transpose of broadcasting and of promotion: sum g to the shape of x, and give it its dtype."""
    lead = g.ndim - x.ndim
    stretched = [i for i, n in enumerate(x.shape, lead) if n == 1 != g.shape[i]]
    if axes := (*range(lead), *stretched):
        g = reshape(sum(g, axes), x.shape)
    return g if g.dtype == x.dtype else astype(g, x.dtype)


def primitive(
    f: Callable[..., Any], *rules: Callable[..., Array], each: Callable[[int], Any] | None = None
) -> Callable[..., Array]:
    """An operation on arrays, made from one on NumPy's.

    The i-th rule, ``rules[i]`` or ``each(i)``, is called with (g, out, *args, **static) and gives the
    cotangent of args[i] up to `_fit`: rules are written as if nothing were broadcast or promoted. An
    operation without rules is constant almost everywhere.
    """
    rule = each or rules.__getitem__

    def apply(*args: Any, **static: Any) -> Array:
        level = builtins.max((a.level for a in args if isinstance(a, Array)), default=0)
        if level == 0:
            return Array(np.asarray(f(*(a.value if isinstance(a, Array) else a for a in args), **static)))
        inside = tuple(cut(a, level) for a in args)
        out = apply(*inside, **static)
        if not (rules or each) or out.dtype.kind in "biu":
            return out
        if out.dtype.kind != "f":
            raise NoDerivative(f"derivatives of {out.dtype} results")
        pairs = enumerate(zip(args, inside, strict=True))
        parents = tuple((a.node, rule(i)) for i, (a, value) in pairs if a is not value)
        return Array(out, level, Node(out, inside, static, parents))

    return apply


def _none(what: str) -> Callable[..., Array]:
    def rule(*_: Any, **__: Any) -> Array:
        raise NoDerivative(f"the derivative of {what}")

    return rule


# Element by element.

add = primitive(np.add, lambda g, out, a, b: g, lambda g, out, a, b: g)
subtract = primitive(np.subtract, lambda g, out, a, b: g, lambda g, out, a, b: -g)
multiply = primitive(np.multiply, lambda g, out, a, b: g * b, lambda g, out, a, b: g * a)
divide = primitive(np.divide, lambda g, out, a, b: g / b, lambda g, out, a, b: -g * out / b)
pow = primitive(np.power, lambda g, out, x, n: g * n * x ** (n - (n != 0)), _none("pow by its exponent"))
negative = primitive(np.negative, lambda g, out, x: -g)
sqrt = primitive(np.sqrt, lambda g, out, x: 0.5 * g / out)
square = primitive(np.square, lambda g, out, x: 2.0 * g * x)
exp = primitive(np.exp, lambda g, out, x: g * out)
expm1 = primitive(np.expm1, lambda g, out, x: g * (out + 1.0))
log = primitive(np.log, lambda g, out, x: g / x)
log1p = primitive(np.log1p, lambda g, out, x: g / (1.0 + x))
tanh = primitive(np.tanh, lambda g, out, x: g * (1.0 - out * out))
sin = primitive(np.sin, lambda g, out, x: g * cos(x))
cos = primitive(np.cos, lambda g, out, x: -g * sin(x))
abs = primitive(np.abs, lambda g, out, x: g * sign(x))
where = primitive(
    np.where,
    _none("where by its condition"),
    lambda g, out, c, x, y: where(c, g, 0.0),
    lambda g, out, c, x, y: where(c, 0.0, g),
)


def _to_extremum(g: Array, out: Array, a: Any, b: Any) -> Array:
    return where(equal(a, b), 0.5 * g, where(equal(a, out), g, 0.0))


_extremum = (_to_extremum, lambda g, out, a, b: _to_extremum(g, out, b, a))
maximum, minimum = primitive(np.maximum, *_extremum), primitive(np.minimum, *_extremum)
sign, isfinite, round = primitive(np.sign), primitive(np.isfinite), primitive(np.round)
logical_not, bitwise_invert = primitive(np.logical_not), primitive(np.invert)
logical_and, logical_or = primitive(np.logical_and), primitive(np.logical_or)
floor_divide, remainder = primitive(np.floor_divide), primitive(np.remainder)
shift_left, shift_right = primitive(np.left_shift), primitive(np.right_shift)
bitwise_and, bitwise_or = primitive(np.bitwise_and), primitive(np.bitwise_or)
equal, not_equal = primitive(np.equal), primitive(np.not_equal)
less, less_equal = primitive(np.less), primitive(np.less_equal)
greater, greater_equal = primitive(np.greater), primitive(np.greater_equal)
zeros_like, ones_like = primitive(np.zeros_like), primitive(np.ones_like)


# Shape and type.


def asarray(x: Any, dtype: Any = None) -> Array:
    """Copy x into an array, unless it is one."""
    if not isinstance(x, Array):
        return Array(np.array(x, dtype))
    return x if dtype is None or x.dtype == dtype else astype(x, dtype)


def ravel(x: Any) -> Array:
    return reshape(x, (-1,))


def concatenate(arrays: Sequence[Any], axis: int = 0) -> Array:
    return _concatenate(*arrays, axis=axis)


def stack(arrays: Sequence[Any], axis: int = 0) -> Array:
    arrays = [asarray(x) for x in arrays]
    axis %= arrays[0].ndim + 1
    return concatenate([reshape(x, (*x.shape[:axis], 1, *x.shape[axis:])) for x in arrays], axis)


def _add_at(x: np.ndarray, key: Any, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, x.dtype)
    np.add.at(out, key, x)
    return out


def _piece(i: int) -> Callable[..., Array]:
    def rule(g: Array, out: Array, *arrays: Any, axis: int) -> Array:
        *_, start, end = itertools.accumulate((np.shape(x)[axis] for x in arrays[: i + 1]), initial=0)
        return g[(slice(None),) * (axis % g.ndim) + (slice(start, end),)]

    return rule


reshape = primitive(np.reshape, lambda g, out, x, shape: reshape(g, x.shape))
astype = primitive(np.ndarray.astype, lambda g, out, x, dtype: g)
broadcast_to = primitive(np.broadcast_to, lambda g, out, x, shape: g)
permute_dims = primitive(np.transpose, lambda g, out, x, axes: permute_dims(g, tuple(np.argsort(axes))))
_index = primitive(operator.getitem, lambda g, out, x, key: _scatter(g, key, x.shape))
_scatter = primitive(_add_at, lambda g, out, x, key, shape: g[key])
_concatenate = primitive(lambda *arrays, axis: np.concatenate(arrays, axis), each=_piece)
concat = concatenate
finfo = np.finfo


# Reductions.


def mean(x: Any, axis: Any = None, keepdims: bool = False) -> Array:
    x = asarray(x)
    count = math.prod(n for n, kept in zip(x.shape, _kept(x, axis), strict=True) if kept == 1)
    return sum(x, axis, keepdims) / count


def _reduction(f: Callable[..., Any], *rules: Callable[..., Array]) -> Callable[..., Array]:
    return primitive(lambda x, axis=None, keepdims=False: f(x, axis=axis, keepdims=keepdims), *rules)


def _kept(x: Array, axis: Any) -> tuple[int, ...]:
    axes = range(x.ndim) if axis is None else [i % x.ndim for i in np.atleast_1d(axis)]
    return tuple(1 if i in axes else n for i, n in enumerate(x.shape))


def _to_terms(g: Array, out: Array, x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    return broadcast_to(reshape(g, _kept(x, axis)), x.shape)


def _to_attained(g: Array, out: Array, x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    attained = equal(x, reshape(out, _kept(x, axis)))
    return where(attained, reshape(g, _kept(x, axis)) / sum(attained, axis, True), 0.0)


sum = _reduction(np.sum, _to_terms)
max, min = _reduction(np.max, _to_attained), _reduction(np.min, _to_attained)
all, any = _reduction(np.all), _reduction(np.any)


# Linear algebra.


class Eigh(NamedTuple):
    """The decomposition a = v diag(w) vᵀ of a symmetric matrix."""

    eigenvalues: Array
    eigenvectors: Array


def matmul(a: Any, b: Any) -> Array:
    a, b = asarray(a), asarray(b)
    product = _matmul(a[None, :] if a.ndim < 2 else a, b[:, None] if b.ndim < 2 else b)
    return reshape(product, product.shape[:-2] + a.shape[-2:-1] + (b.shape[-1:] if b.ndim > 1 else ()))


def _solve(a: Any, b: Any) -> Array:
    b = asarray(b)
    return _solve_columns(a, b) if b.ndim > 1 else reshape(_solve_columns(a, b[:, None]), b.shape)


_matmul = primitive(np.matmul, lambda g, out, a, b: g @ b.mT, lambda g, out, a, b: a.mT @ g)
_solve_columns = primitive(
    np.linalg.solve,
    lambda g, out, a, b: -_solve_columns(a.mT, g) @ out.mT,
    lambda g, out, a, b: _solve_columns(a.mT, g),
)
_eigenvalues = primitive(lambda a: np.linalg.eigh(a).eigenvalues, _none("eigh"))
_eigenvectors = primitive(lambda a: np.linalg.eigh(a).eigenvectors, _none("eigh"))
_singular = [
    primitive(lambda a, full_matrices, k=k: np.linalg.svd(a, full_matrices)[k], _none("svd"))
    for k in range(3)
]
linalg = SimpleNamespace(
    solve=_solve,
    eigh=lambda a: Eigh(_eigenvalues(a), _eigenvectors(a)),
    svd=lambda a, full_matrices=True: tuple(part(a, full_matrices=full_matrices) for part in _singular),
)


# The array.


def _swapped(f: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, y: f(y, x)


@final
class Array:
    """An immutable array. Level 0 holds data of NumPy; each higher level an array of a lower one."""

    __slots__ = ("level", "node", "value")
    __array_ufunc__ = None  # NumPy's operators leave the work to ours

    def __init__(self, value: Any, level: int = 0, node: Node | None = None) -> None:
        self.value, self.level, self.node = value, level, node

    @property
    def data(self) -> np.ndarray:
        """The values, whatever is being differentiated."""
        return np.asarray(self.value.data if self.level else self.value)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    T = property(lambda self: permute_dims(self, (*reversed(range(self.ndim)),)))
    mT = property(lambda self: permute_dims(self, (*range(self.ndim - 2), self.ndim - 1, self.ndim - 2)))

    def reshape(self, *shape: Any) -> Array:
        return reshape(self, shape[0] if len(shape) == 1 else shape)

    def astype(self, dtype: Any) -> Array:
        return astype(self, dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.level:
            raise TypeError("NumPy cannot take an array while a derivative is being traced through it")
        return np.array(self.data, dtype, copy=copy)

    def __repr__(self) -> str:
        return f"pebble.{self.data!r}"

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return operator.index(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __float__(self) -> float:
        return float(self.data)

    __getitem__ = _index
    __neg__, __abs__ = negative, abs
    __add__, __radd__ = add, add
    __sub__, __rsub__ = subtract, _swapped(subtract)
    __mul__, __rmul__ = multiply, multiply
    __truediv__, __rtruediv__ = divide, _swapped(divide)
    __matmul__, __rmatmul__ = matmul, _swapped(matmul)
    __pow__ = pow
    __floordiv__, __mod__, __lshift__, __rshift__ = floor_divide, remainder, shift_left, shift_right
    __and__, __rand__ = bitwise_and, bitwise_and
    __or__, __ror__ = bitwise_or, bitwise_or
    __invert__ = bitwise_invert
    __eq__, __ne__ = equal, not_equal  # type: ignore[assignment]
    __lt__, __le__, __gt__, __ge__ = less, less_equal, greater, greater_equal


# Randomness.


@final
class Random(threading.local):
    """A generator for each thread, so that none disturbs the draws of another."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        self._generator = np.random.default_rng(seed)

    def normal(self, size: int | tuple[int, ...] = ()) -> Array:
        return Array(np.asarray(self._generator.normal(size=size)))

    def get_state(self) -> dict[str, Any]:
        return dict(self._generator.bit_generator.state)

    def set_state(self, state: dict[str, Any]) -> None:
        self._generator.bit_generator.state = state


random = Random()
