"""NumPy as a backend: derivatives by HIPS autograd, trees by optree, loops by Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, ClassVar, final

import autograd.numpy as anp
import numpy as np
import optree
from autograd.tracer import getval, isbox

from hypergrad.backend import Array, Backend, Pullback, Scalar, Tree
from hypergrad.backend.linear import LinearSolve
from hypergrad.backend.memory import Memory
from hypergrad.backend.random import Random
from hypergrad_numpy.resources import GlobalGenerator, WritableMemory
from hypergrad_numpy.tracing import cast, depth, is_float, trace, uses, zeros_like, zeros_with_pullback


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

    def uses(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, ...]:
        return uses(f, primals)

    @cached_property
    def random(self) -> Random:
        return GlobalGenerator(self)

    @cached_property
    def memory(self) -> Memory:
        return WritableMemory(self)

    def form(self, tree: Tree) -> Hashable:
        leaves, structure = optree.tree_flatten(tree)
        return structure, tuple([(x.dtype, x.shape) if hasattr(x, "dtype") else type(x) for x in leaves])

    def is_float(self, leaf: Any) -> bool:
        return is_float(leaf)

    def cast(self, array: Array, dtype: str) -> Array:
        with np.errstate(invalid="ignore"):  # numbers that do not fit are undefined in every framework
            return array.astype(dtype) if isbox(array) else np.asarray(array).astype(dtype)

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        ys, structure = optree.tree_flatten(y)
        sums = []
        for u, v in zip(optree.tree_leaves(x), ys, strict=True):
            if type(v) is np.ndarray:  # the common case, inlined
                total = a * u + v if v.dtype.kind == "f" else v
                sums.append(total if type(total) is np.ndarray and total.dtype == v.dtype else cast(total, v))
            else:
                sums.append(cast(a * u + v, v) if is_float(v) else v)
        return structure.unflatten(sums)

    def inner(self, x: Tree, y: Tree) -> Scalar:
        total = None
        for u, v in zip(optree.tree_leaves(x), optree.tree_leaves(y), strict=True):
            if not (type(u) is type(v) is np.ndarray and u.dtype.char in "fd"):
                return super().inner(x, y)
            product = np.sum(u * v)
            if total is not None and total.dtype != product.dtype:
                return super().inner(x, y)
            total = product if total is None else total + product
        return super().inner(x, y) if total is None else total

    def zeros(self, tree: Tree) -> Tree:
        return optree.tree_map(zeros_like, tree)

    def number(self, scalar: Scalar) -> Any:
        return None if isbox(scalar) else np.asarray(scalar)[()]

    def linear_solve(
        self, matvec: Any, v: Tree, solve: Any, solve_derivative: Any, symmetric: bool
    ) -> tuple[Tree, Tree]:
        rule = LinearSolve(self, depth, zeros_with_pullback, solve_derivative, symmetric)
        return rule(matvec, v, solve)

    def copy(self, tree: Tree) -> Tree:
        return self.map(lambda x: x if isbox(x) else np.array(x), tree)
