"""JAX as a backend: trees by ``jax.tree_util``, loops by ``jax.lax``."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from hypergrad.backend import Array, Backend, Kind, Leaf, Pullback, Push, Scalar, Tree
from hypergrad.backend.loops import Loops
from hypergrad.backend.memory import Memory
from hypergrad.backend.random import Random
from hypergrad.backend.trees import Trees
from hypergrad.errors import no_outer_derivative
from hypergrad_jax.leaves import is_float, is_key, tied, zeros
from hypergrad_jax.linear import linearize, uses, vjp
from hypergrad_jax.loops import JaxLoops
from hypergrad_jax.memory import JaxMemory
from hypergrad_jax.trees import JaxTrees


@final
class JaxBackend(Backend):
    """JAX arrays, concrete or traced, on any device and sharded in any way.

    Estimates are pure functions, to be compiled by ``jax.jit``. Wrong shapes, dtypes and structures raise
    while tracing. A NaN or a solve that did not converge cannot: it stands in the report, and
    ``estimator.check(out)`` raises it outside of the program.
    """

    name: ClassVar[str] = "jax"
    xp: ClassVar[Any] = SimpleNamespace(**vars(jnp))
    compiles: ClassVar[bool] = True

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, jax.Array)

    def readable(self, *leaves: Array) -> bool:
        return not any(isinstance(leaf, jax.Array) and _is_far(leaf) for leaf in leaves)

    def asarray(self, values: Any, like: Array | None = None) -> Array:
        if like is not None and is_key(like):
            return jax.random.wrap_key_data(values, impl=jax.random.key_impl(like))
        return jnp.asarray(values, None if like is None else jnp.result_type(like))

    def to_numpy(self, array: Array) -> Any:
        return np.asarray(jax.random.key_data(array) if is_key(array) else array)

    def detach(self, tree: Tree) -> Tree:
        return self.map(lambda x: lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)

    def vjp(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Pullback, Tree]:
        return vjp(f, primals)

    # The components.

    @cached_property
    def trees(self) -> Trees:
        return JaxTrees()

    @cached_property
    def loops(self) -> Loops:
        return JaxLoops(self)

    @cached_property
    def random(self) -> Random:
        return _Keys(self)

    @cached_property
    def memory(self) -> Memory:
        return JaxMemory(self)

    # Leaves.

    def describe(self, leaf: Array) -> Leaf:
        dtype = jnp.result_type(leaf)
        kinds: dict[Kind, Any] = {
            "float": jnp.floating,
            "complex": jnp.complexfloating,
            "bool": jnp.bool_,
            "int": jnp.integer,
        }
        kind: Kind = next((name for name, base in kinds.items() if jnp.issubdtype(dtype, base)), "other")
        return Leaf(kind, str(dtype), jnp.shape(leaf), dtype.itemsize, "jax")

    def form(self, tree: Tree) -> Hashable:
        leaves, structure = jax.tree_util.tree_flatten(tree)
        return structure, tuple([(x.dtype, x.shape) if isinstance(x, jax.Array) else type(x) for x in leaves])

    def is_float(self, leaf: Any) -> bool:
        return is_float(leaf)

    def cast(self, array: Array, dtype: str) -> Array:
        return jnp.asarray(array).astype(dtype)

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        pairs = zip(self.flatten(x)[0], self.flatten(y)[0], strict=True)
        products = [_dot(a, b) for a, b in pairs if is_float(a)]
        if not products:
            return jnp.zeros(())
        narrowest = min((p.dtype for p in products), key=lambda dtype: dtype.itemsize)
        return sum(products[1:], products[0]).astype(narrowest)

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        def leaf(x: Array, y: Array) -> Array:
            return (a * x + y).astype(y.dtype) if is_float(y) else y

        return self.map(leaf, x, y)

    def zeros(self, tree: Tree) -> Tree:
        return self.map(zeros, tree)

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        return ravel_pytree(tree)

    # Derivatives.

    def uses(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, ...]:
        return uses(f, primals)

    def linearize(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Push, Tree]:
        return linearize(f, primals)

    def linear_solve(
        self, matvec: Any, v: Tree, solve: Any, solve_derivative: Any, symmetric: bool
    ) -> tuple[Tree, Tree]:
        # JAX transposes this only if all leaves of A p have a derivative, or none.
        solution: tuple[Tree, Tree] = lax.custom_linear_solve(
            lambda p: tied(matvec(p)),
            tied(v),
            solve,
            transpose_solve=solve_derivative,
            symmetric=symmetric,
            has_aux=True,
        )
        return solution

    def nondifferentiable(self, tree: Tree, what: str) -> Tree:
        return _nondifferentiable(what, tree)

    def constants(self, tree: Tree) -> Tree:
        # A scalar made of a Python number is weakly typed, and a step of training returns a strong type:
        # programs would be compiled twice.
        return self.map(lambda x: x.astype(x.dtype) if is_float(x) and x.weak_type else x, tree)


class _Keys(Random):
    """JAX has no generator of its own: keys come with the batch."""

    def turn(self, problem: Any, undo: bool = True) -> AbstractContextManager[None]:
        return nullcontext()

    def normal(self, seed: int, count: Any, shape: tuple[int, ...], like: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.normal(key, shape, jnp.result_type(like))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nondifferentiable(what: str, tree: Tree) -> Tree:
    return tree


@_nondifferentiable.defjvp
def _has_no_derivative(what: str, primals: Any, tangents: Any) -> Any:
    raise no_outer_derivative(what)


def _is_far(leaf: jax.Array) -> bool:
    """Is the array traced, or on a device that one would have to wait for?"""
    return isinstance(leaf, jax.core.Tracer) or leaf.sharding.device_set != {jax.devices("cpu")[0]}


def _dot(x: Array, y: Array) -> Scalar:
    """⟨x, y⟩ of two leaves, accumulated in float32 or better.

    A sum of products, since ``jnp.vdot`` flattens its arguments, and would gather sharded ones to do so.
    """
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    return jnp.sum(x.astype(wide) * y.astype(wide))
