"""A third party's backend: `hypergrad` over the arrays of `pebble`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, final

import pebble
from pebble import Array

from hypergrad.backend import Backend, Pullback, Tree
from hypergrad.backend.random import Random


@final
class PebbleBackend(Backend):
    """Arrays of pebble: eager, on the CPU, with derivatives of any order."""

    name: ClassVar[str] = "pebble"
    xp: ClassVar[Any] = pebble

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, Array)

    def readable(self, *leaves: Any) -> bool:
        return not any(isinstance(x, Array) and x.level for x in leaves)

    def asarray(self, values: Any, like: Any = None) -> Array:
        return pebble.asarray(values, None if like is None else pebble.asarray(like).dtype)

    def to_numpy(self, array: Any) -> Any:
        return pebble.asarray(array).data

    def detach(self, tree: Tree) -> Tree:
        return self.map(lambda x: Array(x.data) if isinstance(x, Array) else x, tree)

    def vjp(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Pullback, Tree]:
        leaves, unflatten = self.flatten(primals)
        level = pebble.new_level()
        inputs = [pebble.variable(x, level) if self.is_float(x) else x for x in leaves]
        value, aux = f(*unflatten(inputs))
        pullback = _Pullback(inputs, self.flatten(value)[0], level, unflatten)
        value, aux = self.map(lambda x: pebble.cut(x, level), (value, aux))
        return value, pullback, aux

    @cached_property
    def random(self) -> Random:
        return _OfTheThread(self)


class _OfTheThread(Random):
    """Pebble's generator, one for each thread."""

    def state(self, seed: int | None = None) -> Any:
        return (pebble.random if seed is None else pebble.Random(seed)).get_state()

    def restore(self, state: Any) -> None:
        pebble.random.set_state(state)


@final
class _Pullback(Pullback):
    """u ↦ uᵀ ∂f/∂primals, along the nodes of one level."""

    def __init__(
        self, inputs: list[Any], outputs: list[Any], level: int, unflatten: Callable[[Sequence[Any]], Any]
    ) -> None:
        def node(x: Any) -> pebble.Node | None:
            return x.node if isinstance(x, Array) and x.level == level else None

        self._roots, self._ends = [node(x) for x in inputs], [node(x) for x in outputs]
        self._leaves, self._unflatten = [pebble.cut(x, level) for x in inputs], unflatten
        self._nodes = pebble.history(end for end in self._ends if end is not None)

    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        given = zip(self._ends, PebbleBackend().flatten(cotangent)[0], strict=True)
        slopes = pebble.backward(self._nodes, [(end, g) for end, g in given if end is not None])
        pairs = zip(self._roots, self._leaves, strict=True)
        return self._unflatten([slopes[x] if x in slopes else pebble.zeros_like(leaf) for x, leaf in pairs])

    @property
    def reached(self) -> tuple[Tree, ...]:
        return self._unflatten([root in set(self._nodes) for root in self._roots])

    @property
    def nbytes(self) -> int:
        held = [*self._leaves, *(x for node in self._nodes for x in (node.out, *node.args))]
        owners = [x.data if x.data.base is None else x.data.base for x in held if isinstance(x, Array)]
        return sum({id(owner): owner.nbytes for owner in owners}.values())
