"""The backend protocol on torch tensors: trees by optree, derivatives by torch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, final

import array_api_compat.torch as compat
import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from hypergrad.backend import Array, Kind, Leaf, Scalar, Tree, eager
from hypergrad.errors import no_outer_derivative
from hypergrad_torch.graph import depth, detach, is_float, linearise, nested, one_deeper, pulled_by
from hypergrad_torch.optimizers import TorchOptimizer
from hypergrad_torch.randomness import generator, replay, restore

LAUNCHED = 2**20
"""Elements of a block on a device, where one of fewer takes no less time."""

_NUMBERS = {
    torch.float16: np.float16,
    torch.bfloat16: np.float32,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


def _where(condition: Any, x: Any, y: Any) -> Any:
    """``torch.where`` that takes Python numbers everywhere, and a Python boolean as the condition."""
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)


@final
@dataclass(frozen=True)
class TorchBackend:
    """Torch tensors on any device, differentiated in reverse mode to any order.

    Losses use torch as usual; `torch.func.functional_call` runs a module on a dict of parameters. Nothing
    is computed that a device would have to be waited for: where values cannot be read without waiting
    (CUDA, ``meta``) faults are carried in the report, and loops of solvers run to their limit with the
    iterate held once they are done.
    """

    name = "torch"
    compiles = False
    xp = SimpleNamespace(**{**vars(compat), "where": _where})

    # Leaves and trees.

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor)

    def describe(self, leaf: Array) -> Leaf:
        if not isinstance(leaf, Tensor):
            leaf = torch.tensor(leaf)
        dtype = leaf.dtype
        kind: Kind = (
            "float" if dtype.is_floating_point
            else "complex" if dtype.is_complex
            else "bool" if dtype == torch.bool
            else "int"
        )  # fmt: skip
        return Leaf(
            kind, str(dtype).removeprefix("torch."), tuple(leaf.shape), leaf.itemsize, str(leaf.device)
        )

    def readable(self, *leaves: Array) -> bool:
        return not any(isinstance(leaf, Tensor) and _symbolic(leaf) for leaf in leaves)

    def number(self, scalar: Scalar) -> Any:
        if not isinstance(scalar, Tensor):
            return np.asarray(scalar)[()]
        return None if scalar.requires_grad or _symbolic(scalar) else _NUMBERS[scalar.dtype](scalar.item())

    flatten = staticmethod(eager.flatten)
    paths = staticmethod(eager.paths)
    map = staticmethod(eager.map)

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        pairs = zip(eager.leaves(x), eager.leaves(y), strict=True)
        products = [_dot(a, b) for a, b in pairs if is_float(a)]
        return sum(products[1:], products[0]) if products else torch.zeros((), dtype=torch.float64)

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        xs, (ys, unflatten) = eager.leaves(x), self.flatten(y)
        # In a graph the fused sum would keep both of its arguments, and that of two tensors keeps none.
        if len(ys) > 1 and not isinstance(a, Tensor) and _alike(xs + ys):
            return unflatten(torch._foreach_add(ys, xs, alpha=a))

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
        shapes = [leaf.shape for leaf in leaves]

        def unravel(vector: Array) -> Tree:
            parts = torch.split(vector, [shape.numel() for shape in shapes])
            return unflatten([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

        return torch.cat([leaf.reshape(-1) for leaf in leaves]), unravel

    # Calculus.

    def value_and_grad(self, f: Callable[[Tree], Scalar], x: Tree) -> tuple[Scalar, Tree]:
        value, _, pullback = linearise(f, (x,), has_aux=False)
        (gradient,) = pullback(torch.ones_like(value))
        return value, gradient

    def vjp(self, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
        value, aux, pullback = linearise(f, primals, has_aux)
        return (value, pullback, aux) if has_aux else (value, pullback)

    def jvp(self, f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Any:
        """The pullback is linear in its cotangent; its own pullback is the derivative of f."""
        value, _, pullback = linearise(f, primals, has_aux=False)
        _, _, pushforward = linearise(pullback, (self.zeros(value),), has_aux=False)
        (tangent,) = pushforward(tangents)
        return value, tangent

    def linear_solve(
        self, matvec: Any, v: Tree, solve: Any, again: Any, symmetric: bool
    ) -> tuple[Tree, Tree]:
        return eager.LinearSolve(self, depth, pulled_by, again, symmetric)(matvec, v, solve)

    watched = staticmethod(one_deeper)
    detach = staticmethod(detach)

    def opaque(self, tree: Tree, what: str) -> Tree:
        if nested() and any(isinstance(x, Tensor) and x.requires_grad for x in self.flatten(tree)[0]):
            raise no_outer_derivative(what)
        return tree

    def copy(self, tree: Tree) -> Tree:
        return self.map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)

    def adopt(self, tree: Tree) -> Tree:
        return tree if nested() else detach(tree)

    # Control flow.

    scan = staticmethod(eager.scan)
    repeat = staticmethod(eager.repeat)
    each = staticmethod(eager.each)
    cond = staticmethod(eager.cond)
    stack = staticmethod(eager.stack)
    room = staticmethod(eager.room)
    dense = eager.dense
    collect = eager.collect
    linearize = eager.linearize
    normal = eager.normal
    compile = staticmethod(eager.compile)
    tell = staticmethod(eager.tell)

    def while_loop(
        self, going: Callable[[Tree], Any], body: Callable[[Tree], Tree], carry: Tree, limit: int
    ) -> Tree:
        for _ in range(limit):
            on = going(carry)
            if self.readable(on):
                if not on:
                    break
                carry = body(carry)
            else:
                # To read the flag would be to wait for the device: go on, and hold what is done.
                carry = self.map(lambda new, old, on=on: _where(on, new, old), body(carry), carry)
        return carry

    def elementwise(
        self, f: Callable[..., tuple[Sequence[Array], Any]], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        on_host = [*used, *given][0].device.type == "cpu"
        return eager.elementwise(f, used, given, eager.BLOCK if on_host else LAUNCHED)

    def put(self, items: Any, k: Any, item: Tree) -> Any:
        if not isinstance(k, Tensor):
            return eager.put(items, k, item)

        # Which place it is, only the device knows.
        def here(i: int, kept: Tree) -> Tree:
            return self.map(lambda new, old: torch.where(k == i, new, old), item, kept)

        return [here(i, kept) for i, kept in enumerate(items)]

    def take(self, items: Any, k: Any) -> Tree:
        if not isinstance(k, Tensor):
            return eager.take(items, k)
        return self.map(lambda *leaves: torch.stack(leaves).index_select(0, k.reshape(1))[0], *items)

    # Randomness: torch's default generators.

    generator = staticmethod(generator)
    replay = staticmethod(replay)
    restore = staticmethod(restore)

    # Optimisers.

    def update_rule(self, optimizer: Any) -> Any:
        return TorchOptimizer(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None

    # The way in and out.

    def asarray(self, values: Any, like: Array | None = None) -> Array:
        values = np.asarray(values)
        device = None if like is None else like.device
        dtype = torch.from_numpy(values.reshape(-1)[:0].copy()).dtype if like is None else like.dtype
        if values.shape == ():
            return torch.full((), values.item(), dtype=dtype, device=device)
        return torch.tensor(values, dtype=dtype, device=device)

    def to_host(self, tree: Tree) -> Tree:
        return self.map(_pinned, tree)

    def from_host(self, tree: Tree) -> Tree:
        return self.map(lambda x: x.back() if isinstance(x, _Pinned) else x, tree)

    def cast(self, array: Array, dtype: str) -> Array:
        return array.to(getattr(torch, dtype))

    def to_numpy(self, array: Array) -> Any:
        if not isinstance(array, Tensor):
            return np.asarray(array)
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()


@dataclass(frozen=True)
class _Pinned:
    """A tensor in page-locked memory, and the device that it came from."""

    held: Tensor
    device: torch.device

    def back(self) -> Tensor:
        return self.held.to(self.device, non_blocking=True)


def _pinned(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.device.type != "cuda":
        return x
    held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return _Pinned(held.copy_(x, non_blocking=True), x.device)


def _symbolic(x: Tensor) -> bool:
    """Is there no value that could be read without waiting for a device?"""
    return not x.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(x) or isinstance(x, FakeTensor)


def _alike(leaves: list[Any]) -> bool:
    """Are these floats of one dtype, and part of no graph?"""
    recorded = torch.is_grad_enabled()
    return all(
        is_float(x) and x.dtype is leaves[0].dtype and not (recorded and x.requires_grad) for x in leaves
    )


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """The tensor in a dtype: torch takes a microsecond to see that it is one already."""
    return x if x.dtype is dtype else x.to(dtype)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ of two leaves, accumulated in float32 or better."""
    if x.itemsize < 4:
        x = x.float()
    return torch.dot(x.flatten(), _in(x.dtype, y).flatten())
