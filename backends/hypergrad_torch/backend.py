"""PyTorch as a backend: derivatives by torch's autograd, trees by optree, loops by Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, final

import array_api_compat.torch as compat
import numpy as np
import optree
import torch
from torch import Tensor

from hypergrad.backend import Array, Backend, Kind, Leaf, Pullback, Scalar, Tree
from hypergrad.backend.linear import LinearSolve
from hypergrad.backend.loops import Loops
from hypergrad.backend.memory import Memory
from hypergrad.backend.random import Random
from hypergrad.errors import no_outer_derivative
from hypergrad_torch.autocast import as_called, without_autocast
from hypergrad_torch.graph import depth, detach, nested, one_deeper, vjp, zeros_with_pullback
from hypergrad_torch.leaves import is_fixed, is_float
from hypergrad_torch.loops import TorchLoops, where
from hypergrad_torch.memory import TorchMemory
from hypergrad_torch.private import axpy_of_all, is_symbolic
from hypergrad_torch.randomness import Generators

_NUMBERS = {
    torch.float16: np.float16,
    torch.bfloat16: np.float32,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


@final
class TorchBackend(Backend):
    """Torch tensors on any device, differentiated in reverse mode to any order.

    Losses use torch as usual; `torch.func.functional_call` runs a module on a dict of parameters. Nothing
    waits for a device. Where values cannot be read without waiting (CUDA, ``meta``), faults are put into the
    report instead of raised, and loops of solvers run to their limit, with the iterate unchanged after they
    have converged.
    """

    name: ClassVar[str] = "torch"
    xp: ClassVar[Any] = SimpleNamespace(**{**vars(compat), "where": where})

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor)

    def readable(self, *leaves: Array) -> bool:
        return not any(isinstance(leaf, Tensor) and is_symbolic(leaf) for leaf in leaves)

    def asarray(self, values: Any, like: Array | None = None) -> Array:
        values = np.asarray(values)
        device = None if like is None else like.device
        dtype = torch.from_numpy(values.reshape(-1)[:0].copy()).dtype if like is None else like.dtype
        if values.shape == ():
            return torch.full((), values.item(), dtype=dtype, device=device)
        return torch.tensor(values, dtype=dtype, device=device)

    def to_numpy(self, array: Array) -> Any:
        if not isinstance(array, Tensor):
            return np.asarray(array)
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    def detach(self, tree: Tree) -> Tree:
        return detach(tree)

    def vjp(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Pullback, Tree]:
        return vjp(f, primals)

    # The components.

    @cached_property
    def loops(self) -> Loops:
        return TorchLoops(self)

    @cached_property
    def random(self) -> Random:
        return Generators(self)

    @cached_property
    def memory(self) -> Memory:
        return TorchMemory(self)

    # Leaves.

    def describe(self, leaf: Array) -> Leaf:
        leaf = leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)
        dtype = leaf.dtype
        kind: Kind = (
            "float" if dtype.is_floating_point
            else "complex" if dtype.is_complex
            else "bool" if dtype == torch.bool
            else "int"
        )  # fmt: skip
        name = str(dtype).removeprefix("torch.")
        return Leaf(kind, name, tuple(leaf.shape), leaf.itemsize, str(leaf.device))

    def form(self, tree: Tree) -> Hashable:
        leaves, structure = optree.tree_flatten(tree)
        about = [
            (x.dtype, x.shape, x.device, is_fixed(x)) if isinstance(x, Tensor) else type(x) for x in leaves
        ]
        return structure, tuple(about)

    def is_float(self, leaf: Any) -> bool:
        return is_float(leaf)

    def is_fixed(self, leaf: Any) -> bool:
        return is_fixed(leaf)

    def cast(self, array: Array, dtype: str) -> Array:
        return array.to(getattr(torch, dtype))

    def number(self, scalar: Scalar) -> Any:
        if not isinstance(scalar, Tensor):
            return np.asarray(scalar)[()]
        return None if scalar.requires_grad or is_symbolic(scalar) else _NUMBERS[scalar.dtype](scalar.item())

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        xs = self.flatten(x)[0]
        pairs = zip(xs, xs if y is x else self.flatten(y)[0], strict=True)
        products = [_dot(a, b) for a, b in pairs if is_float(a)]
        if not products:
            return torch.zeros((), dtype=torch.float64)
        return _in(min((p.dtype for p in products), key=_width), sum(products[1:], products[0]))

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        xs, (ys, unflatten) = self.flatten(x)[0], self.flatten(y)
        # In a graph the fused sum would keep both of its arguments, and that of two tensors keeps none.
        if len(ys) > 1 and not isinstance(a, Tensor) and _alike(xs + ys):
            return unflatten(axpy_of_all(a, xs, ys))

        def leaf(x: Array, y: Array) -> Array:
            if not is_float(y):
                return y
            moved = y + a.to(y.dtype) * x if isinstance(a, Tensor) else torch.add(y, x, alpha=a)
            return _in(y.dtype, moved)

        return unflatten([leaf(x, y) for x, y in zip(xs, ys, strict=True)])

    def zeros(self, tree: Tree) -> Tree:
        return self.map(
            lambda x: torch.zeros_like(x, requires_grad=False) if isinstance(x, Tensor) else type(x)(0), tree
        )

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        leaves, unflatten = self.flatten(tree)
        tensors = [x if isinstance(x, Tensor) else self.asarray(np.asarray(x)) for x in leaves]
        kinds = [(x.shape, x.dtype) for x in tensors]
        sizes = [shape.numel() for shape, _ in kinds]

        def unravel(vector: Array) -> Tree:
            parts = zip(torch.split(vector, sizes), kinds, strict=True)
            return unflatten([_in(dtype, part.reshape(shape)) for part, (shape, dtype) in parts])

        return torch.cat([x.reshape(-1) for x in tensors]), unravel

    # Derivatives.

    def uses(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, ...]:
        return vjp(f, primals)[1].used

    def linear_solve(
        self, matvec: Any, v: Tree, solve: Any, solve_derivative: Any, symmetric: bool
    ) -> tuple[Tree, Tree]:
        rule = LinearSolve(self, depth, zeros_with_pullback, solve_derivative, symmetric)
        return rule(matvec, v, solve)

    def nondifferentiable(self, tree: Tree, what: str) -> Tree:
        if nested() and any(isinstance(x, Tensor) and x.requires_grad for x in self.flatten(tree)[0]):
            raise no_outer_derivative(what)
        return tree

    def recorded(self) -> AbstractContextManager[None]:
        return one_deeper()

    def estimating(self) -> AbstractContextManager[None]:
        return without_autocast()

    def as_called(self) -> AbstractContextManager[None]:
        return as_called()

    def constants(self, tree: Tree) -> Tree:
        return tree if nested() else detach(tree)

    def copy(self, tree: Tree) -> Tree:
        return self.map(lambda x: x.clone() if isinstance(x, Tensor) and not is_fixed(x) else x, tree)


def _alike(leaves: list[Any]) -> bool:
    """Are all of these floats of one dtype that no graph is recorded for?"""
    recorded = torch.is_grad_enabled()
    return all(
        is_float(x) and x.dtype is leaves[0].dtype and not (recorded and x.requires_grad) for x in leaves
    )


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return the tensor in a dtype. The check saves the microsecond of ``to`` where the dtype is right."""
    return x if x.dtype is dtype else x.to(dtype)


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ of two leaves, accumulated in float32 or better."""
    if x.itemsize < 4:
        x = x.float()
    return torch.dot(x.flatten(), _in(x.dtype, y).flatten())
