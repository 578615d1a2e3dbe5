"""A third party's backend: `hypergrad` over the arrays of `pebble`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, final

import numpy as np
import optree
import pebble
from pebble import Array

from hypergrad.backend import Leaf, Scalar, Tree, eager

_KINDS: dict[str, Literal["float", "int", "bool", "complex"]] = {
    "f": "float",
    "i": "int",
    "u": "int",
    "b": "bool",
    "c": "complex",
}


@final
class Pullback:
    """u ↦ uᵀ ∂f/∂primals at one linearisation; see `hypergrad.backend.Pullback`."""

    def __init__(
        self,
        inputs: list[Any],
        outputs: list[Any],
        level: int,
        unflatten: Callable[[Sequence[Any]], tuple[Tree, ...]],
    ) -> None:
        def node(x: Any) -> pebble.Node | None:
            return x.node if isinstance(x, Array) and x.level == level else None

        self._roots, self._ends = [node(x) for x in inputs], [node(x) for x in outputs]
        self._leaves, self._unflatten = [pebble.cut(x, level) for x in inputs], unflatten
        self._nodes = pebble.history(end for end in self._ends if end is not None)

    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        cotangents: dict[pebble.Node, Array] = {}
        for end, leaf in zip(self._ends, optree.tree_leaves(cotangent), strict=True):
            if end is not None:
                g = pebble.asarray(leaf, end.out.dtype)
                if g.shape != end.out.shape:
                    raise ValueError(f"a cotangent has shape {g.shape}, its output {end.out.shape}")
                cotangents[end] = cotangents[end] + g if end in cotangents else g
        found = pebble.backward(self._nodes, cotangents)
        pairs = zip(self._roots, self._leaves, strict=True)
        return self._unflatten([found[x] if x in found else pebble.zeros_like(leaf) for x, leaf in pairs])

    last = __call__

    def onto(self, k: int) -> Callable[[Tree], Tree]:
        return lambda cotangent: self(cotangent)[k]

    @property
    def reached(self) -> tuple[Tree, ...]:
        nodes = set(self._nodes)
        return self._unflatten([root in nodes for root in self._roots])

    @property
    def nbytes(self) -> int:
        held = [*self._leaves, *(x for node in self._nodes for x in (node.out, *node.args))]
        arrays = [x.data if isinstance(x, Array) else x for x in held]
        owners = {id(owner): owner for x in arrays if isinstance(owner := _owner(x), np.ndarray)}
        return sum(owner.nbytes for owner in owners.values())


def _owner(x: Any) -> Any:
    return x.base if isinstance(x, np.ndarray) and isinstance(x.base, np.ndarray) else x


@final
class PebbleBackend:
    """Arrays of pebble: eager, on the CPU, with derivatives of any order."""

    name = "pebble"
    compiles = False
    xp: Any = pebble

    # Leaves and trees.

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, Array)

    def describe(self, leaf: Any) -> Leaf:
        x = pebble.asarray(leaf)
        return Leaf(_KINDS.get(x.dtype.kind, "other"), str(x.dtype), x.shape, x.dtype.itemsize, "cpu")

    def readable(self, *leaves: Any) -> bool:
        return not any(isinstance(x, Array) and x.level for x in leaves)

    def number(self, scalar: Any) -> Any:
        return pebble.asarray(scalar).data[()] if self.readable(scalar) else None

    flatten = staticmethod(eager.flatten)
    paths = staticmethod(eager.paths)
    map = staticmethod(eager.map)

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        pairs = zip(self.flatten(x)[0], self.flatten(y)[0], strict=True)
        products = [pebble.sum(a * b) for a, b in pairs if self._is_float(a)]
        return sum(products[1:], products[0]) if products else pebble.asarray(0.0)

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        def leaf(x: Array, y: Array) -> Array:
            return pebble.asarray(a * x + y, self._dtype(y)) if self._is_float(y) else y

        return self.map(leaf, x, y)

    def zeros(self, tree: Tree) -> Tree:
        return self.map(pebble.zeros_like, tree)

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        leaves, unflatten = self.flatten(self.map(pebble.asarray, tree))
        ends = np.cumsum([leaf.size for leaf in leaves])

        def unravel(vector: Array) -> Tree:
            pieces = [vector[end - x.size : end] for x, end in zip(leaves, ends, strict=True)]
            return unflatten(
                [piece.reshape(x.shape).astype(x.dtype) for x, piece in zip(leaves, pieces, strict=True)]
            )

        return pebble.concatenate([pebble.ravel(leaf) for leaf in leaves]), unravel

    # Calculus.

    def value_and_grad(self, f: Callable[[Tree], Scalar], x: Tree) -> tuple[Scalar, Tree]:
        value, pullback = self.vjp(f, x)
        (gradient,) = pullback(1.0)
        return value, gradient

    def vjp(self, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
        leaves, unflatten = self.flatten(primals)
        level = pebble.new_level()
        inputs = [pebble.variable(x, level) if self._is_float(x) else x for x in leaves]
        result = f(*unflatten(inputs))
        value, aux = result if has_aux else (result, None)
        pullback = Pullback(inputs, self.flatten(value)[0], level, unflatten)
        value, aux = self.map(lambda x: pebble.cut(x, level), (value, aux))
        return (value, pullback, aux) if has_aux else (value, pullback)

    def jvp(self, f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Any:
        """The pullback is linear in its cotangent; its own pullback is the derivative of f."""
        value, pullback = self.vjp(f, *primals)
        _, pushforward = self.vjp(pullback, self.zeros(value))
        (tangent,) = pushforward(tangents)
        return value, tangent

    def detach(self, tree: Tree) -> Tree:
        return self.map(lambda x: Array(x.data) if isinstance(x, Array) else x, tree)

    def adopt(self, tree: Tree) -> Tree:
        return tree

    # Control flow: Python's own.

    scan = staticmethod(eager.scan)
    while_loop = staticmethod(eager.while_loop)
    repeat = staticmethod(eager.repeat)
    each = staticmethod(eager.each)
    cond = staticmethod(eager.cond)
    stack = staticmethod(eager.stack)
    room = staticmethod(eager.room)
    put = staticmethod(eager.put)
    take = staticmethod(eager.take)
    elementwise = staticmethod(lambda f, used, given: f(*used, *given))  # arrays cannot be written to
    dense = eager.dense
    collect = eager.collect
    opaque = staticmethod(lambda tree, what: tree)
    copy = staticmethod(lambda tree: eager.map(lambda x: x, tree))
    to_host = from_host = staticmethod(lambda tree: tree)
    cast = staticmethod(lambda array, dtype: array.astype(dtype))
    # Derivatives go through the solver's own steps.
    linear_solve = staticmethod(lambda matvec, v, solve, again, symmetric: solve(matvec, v))
    watched = staticmethod(nullcontext)
    linearize = eager.linearize
    normal = eager.normal
    compile = staticmethod(eager.compile)
    tell = staticmethod(eager.tell)

    # Randomness: the generator of the thread.

    def generator(self, seed: int | None = None) -> Any:
        return pebble.random.get_state() if seed is None else pebble.Random(seed).get_state()

    @contextmanager
    def replay(self, generator: Any) -> Iterator[None]:
        found = self.generator()
        self.restore(generator)
        try:
            yield
        finally:
            self.restore(found)

    def restore(self, generator: Any) -> None:
        pebble.random.set_state(generator)

    def update_rule(self, optimizer: Any) -> None:
        return None

    # The way in and out.

    def asarray(self, values: Any, like: Array | None = None) -> Array:
        return pebble.asarray(values, None if like is None else self._dtype(like))

    def to_numpy(self, array: Any) -> Any:
        return pebble.asarray(array).data

    @staticmethod
    def _dtype(x: Any) -> Any:
        return pebble.asarray(x).dtype

    def _is_float(self, x: Any) -> bool:
        return bool(self._dtype(x).kind == "f")
