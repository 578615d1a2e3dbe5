"""NumPy as a backend: derivatives by HIPS autograd, trees by optree, loops by Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, ClassVar, final

import autograd.numpy as anp
import numpy as np
import optree
from autograd.tracer import getval, isbox

from hypergrad.backend import Array, Backend, Pullback, Scalar, Tree
from hypergrad.backend.linear import LinearSolve
from hypergrad.backend.memory import Memory, written_in_blocks
from hypergrad.backend.random import Random
from hypergrad_numpy.tracing import cast, depth, is_float, trace, zeros_with_pullback


@final
class NumpyBackend(Backend):
    """NumPy arrays and scalars, differentiated by HIPS autograd to any order.

    Losses use ``autograd.numpy``. Python numbers count as 0-d arrays of NumPy's default dtype. Eager, so
    values can always be read, except where an outer derivative is being traced.
    """

    name: ClassVar[str] = "numpy"
    xp: ClassVar[Any] = anp

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray | np.generic | int | float | complex) or isbox(leaf)

    def readable(self, *leaves: Array) -> bool:
        return not any(map(isbox, leaves))

    def asarray(self, values: Any, like: Array | None = None) -> Array:
        return np.array(values, None if like is None else np.asarray(getval(like)).dtype)

    def to_numpy(self, array: Array) -> Any:
        return np.asarray(getval(array))

    def detach(self, tree: Tree) -> Tree:
        return optree.tree_map(getval, tree)

    def vjp(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Pullback, Tree]:
        return trace(f, primals)

    @cached_property
    def random(self) -> Random:
        return _Global(self)

    @cached_property
    def memory(self) -> Memory:
        return _Written(self)

    def form(self, tree: Tree) -> Hashable:
        leaves, structure = optree.tree_flatten(tree)
        return structure, tuple(
            [
                (x.dtype, x.shape) if isinstance(x, np.ndarray | np.generic) or isbox(x) else type(x)
                for x in leaves
            ]
        )

    def is_float(self, leaf: Any) -> bool:
        return is_float(leaf)

    def cast(self, array: Array, dtype: str) -> Array:
        with np.errstate(invalid="ignore"):  # what an integer cannot hold has no meaning in any framework
            return array.astype(dtype) if isbox(array) else np.asarray(array).astype(dtype)

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        xs, (ys, unflatten) = self.flatten(x)[0], self.flatten(y)
        pairs = zip(xs, ys, strict=True)
        return unflatten([cast(a * x + y, y) if is_float(y) else y for x, y in pairs])

    def linear_solve(
        self, matvec: Any, v: Tree, solve: Any, solve_derivative: Any, symmetric: bool
    ) -> tuple[Tree, Tree]:
        rule = LinearSolve(self, depth, zeros_with_pullback, solve_derivative, symmetric)
        return rule(matvec, v, solve)

    def copy(self, tree: Tree) -> Tree:
        return self.map(lambda x: x if isbox(x) else np.array(x), tree)


class _Global(Random):
    """The global generator behind ``numpy.random.normal`` and its kin."""

    def state(self, seed: int | None = None) -> Any:
        return np.random.get_state() if seed is None else np.random.RandomState(seed).get_state()

    def restore(self, state: Any) -> None:
        np.random.set_state(state)


class _Written(Memory):
    """NumPy's arrays can be written to."""

    def in_blocks(
        self, f: Callable[..., Any], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        return written_in_blocks(f, used, given)
