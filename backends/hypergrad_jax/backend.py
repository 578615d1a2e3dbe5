"""The backend protocol in JAX: trees by ``jax.tree_util``, loops by ``jax.lax``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from hypergrad.backend import Array, Kind, Leaf, Scalar, Tree
from hypergrad.errors import ArgumentError, no_outer_derivative
from hypergrad_jax.leaves import is_float, is_key, tied, zeros
from hypergrad_jax.linear import linearise, linearised, pushforward
from hypergrad_jax.loops import either, elementwise, repeat
from hypergrad_jax.optimizers import as_optax


@final
@dataclass(frozen=True)
class JaxBackend:
    """JAX arrays, concrete or traced, on any device and sharded in any way.

    Estimates are pure functions and belong under ``jax.jit``. What can be known while tracing is raised
    there; what cannot, such as a NaN or a solve that did not converge, is carried in the report, and raised
    by ``estimator.check(out)`` outside.
    """

    name = "jax"
    compiles = True
    xp = SimpleNamespace(**vars(jnp))

    # Leaves and trees.

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, jax.Array)

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

    def readable(self, *leaves: Array) -> bool:
        return not any(isinstance(leaf, jax.Array) and _far(leaf) for leaf in leaves)

    def number(self, scalar: Scalar) -> Any:
        return np.asarray(scalar)[()] if self.readable(scalar) else None

    def flatten(self, tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
        leaves, structure = jax.tree_util.tree_flatten(tree)
        return leaves, partial(jax.tree_util.tree_unflatten, structure)

    def paths(self, tree: Tree, root: str) -> list[str]:
        return [root + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    map = staticmethod(jax.tree_util.tree_map)

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        pairs = zip(self.flatten(x)[0], self.flatten(y)[0], strict=True)
        products = [_dot(a, b) for a, b in pairs if is_float(a)]
        return sum(products[1:], products[0]) if products else jnp.zeros(())

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        def leaf(x: Array, y: Array) -> Array:
            return (a * x + y).astype(y.dtype) if is_float(y) else y

        return self.map(leaf, x, y)

    def zeros(self, tree: Tree) -> Tree:
        return self.map(zeros, tree)

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        return ravel_pytree(tree)

    # Calculus.

    def value_and_grad(self, f: Callable[[Tree], Scalar], x: Tree) -> tuple[Scalar, Tree]:
        value, _, pullback = linearise(f, (x,), has_aux=False)
        (gradient,) = pullback(jnp.ones_like(value))
        return value, gradient

    def vjp(self, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
        value, aux, pullback = linearise(f, primals, has_aux)
        return (value, pullback, aux) if has_aux else (value, pullback)

    def jvp(self, f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Any:
        return pushforward(f, primals, tangents)

    def linearize(self, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
        value, aux, push = linearised(f, primals, has_aux)
        return (value, push, aux) if has_aux else (value, push)

    def linear_solve(
        self, matvec: Any, v: Tree, solve: Any, again: Any, symmetric: bool
    ) -> tuple[Tree, Tree]:
        # The transpose of JAX's own wants all leaves to have a derivative, or none.
        found: tuple[Tree, Tree] = lax.custom_linear_solve(
            lambda p: tied(matvec(p)),
            tied(v),
            solve,
            transpose_solve=again,
            symmetric=symmetric,
            has_aux=True,
        )
        return found

    def watched(self) -> AbstractContextManager[None]:
        return nullcontext()

    def detach(self, tree: Tree) -> Tree:
        return self.map(lambda x: lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)

    def opaque(self, tree: Tree, what: str) -> Tree:
        return _opaque(what, tree)

    def copy(self, tree: Tree) -> Tree:
        return self.map(lambda x: x, tree)

    def adopt(self, tree: Tree) -> Tree:
        # A scalar made of a Python number is weakly typed, and what comes of it is not: programs of it would
        # be compiled twice.
        return self.map(lambda x: x.astype(x.dtype) if is_float(x) and x.weak_type else x, tree)

    # Control flow.

    def scan(
        self,
        body: Callable[[Tree, Any, Any], tuple[Tree, Any]],
        carry: Tree,
        length: int,
        xs: Any = None,
        reverse: bool = False,
    ) -> tuple[Tree, Any]:
        def step(carry: Tree, kx: tuple[Any, Any]) -> tuple[Tree, Any]:
            return body(carry, *kx)

        return lax.scan(step, carry, (jnp.arange(length), xs), length, reverse)

    def while_loop(
        self, going: Callable[[Tree], Any], body: Callable[[Tree], Tree], carry: Tree, limit: int
    ) -> Tree:
        return lax.while_loop(going, body, carry)

    def repeat(
        self, body: Callable[[Tree, Any], tuple[Tree, Tree, Tree, Any]], carry: Tree, limit: int
    ) -> tuple[Tree, Tree, Tree, Any]:
        return repeat(body, carry, limit)

    def each(self, f: Callable[..., Tree], *items: Any) -> Any:
        return jax.vmap(f)(*items)

    def cond(self, pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
        if self.readable(pred):
            return yes() if pred else no()
        return either(pred, yes, no)

    def stack(self, items: Sequence[Tree]) -> Tree:
        try:
            return self.map(lambda *leaves: jnp.stack(leaves), *items)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                "the batches of a list differ in structure or shape, and a compiled loop takes those of one "
                f"kind: drop the odd one, or pass an iterator ({error})"
            ) from error

    def room(self, like: Tree, places: int) -> Tree:
        return self.map(lambda leaf: jnp.zeros((places, *jnp.shape(leaf)), jnp.result_type(leaf)), like)

    def put(self, items: Tree, k: Any, item: Tree) -> Tree:
        return self.map(lambda kept, leaf: kept.at[k].set(leaf), items, item)

    def take(self, items: Tree, k: Any) -> Tree:
        return self.map(lambda leaf: leaf[k], items)

    elementwise = staticmethod(elementwise)

    def dense(self, rows: Tree) -> Tree:
        return rows

    def collect(self, rows: Any) -> Tree:
        rows = self.map(lambda *leaves: jnp.stack(leaves), *rows) if isinstance(rows, list) else rows
        return self.map(lambda x: x if isinstance(x, jax.core.Tracer) else np.asarray(x), rows)

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(f)

    def tell(self, listener: Callable[..., None], *values: Any) -> None:
        jax.debug.callback(listener, *values)

    # Randomness: JAX has no generator; keys come with the batch.

    def generator(self, seed: int | None = None) -> None:
        return None

    def normal(self, seed: int, count: Any, shape: tuple[int, ...], like: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.normal(key, shape, jnp.result_type(like))

    def replay(self, generator: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def restore(self, generator: Any) -> None:
        return None

    # Optimisers.

    def update_rule(self, optimizer: Any) -> Any:
        return as_optax(optimizer)

    # The way in and out.

    def asarray(self, values: Any, like: Array | None = None) -> Array:
        if like is not None and is_key(like):
            return jax.random.wrap_key_data(values, impl=jax.random.key_impl(like))
        return jnp.asarray(values, None if like is None else jnp.result_type(like))

    def to_host(self, tree: Tree) -> Tree:
        return self.map(partial(_move, "Host"), tree)

    def from_host(self, tree: Tree) -> Tree:
        return self.map(partial(_move, "Device"), tree)

    def cast(self, array: Array, dtype: str) -> Array:
        return jnp.asarray(array).astype(dtype)

    def to_numpy(self, array: Array) -> Any:
        return np.asarray(jax.random.key_data(array) if is_key(array) else array)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _opaque(what: str, tree: Tree) -> Tree:
    return tree


@_opaque.defjvp
def _has_no_derivative(what: str, primals: Any, tangents: Any) -> Any:
    raise no_outer_derivative(what)


def _far(leaf: jax.Array) -> bool:
    """Is there no value that could be read without waiting for a device?"""
    return isinstance(leaf, jax.core.Tracer) or leaf.sharding.device_set != {jax.devices("cpu")[0]}


def _move(space: str, leaf: Any) -> Any:
    """A leaf in the memory of the host or of the device, where these are two."""
    if jax.default_backend() == "cpu" or not isinstance(leaf, jax.Array) or not hasattr(jax, "memory"):
        return leaf
    return jax.device_put(leaf, getattr(jax.memory.Space, space))


def _dot(x: Array, y: Array) -> Scalar:
    """⟨x, y⟩ of two leaves, accumulated in float32 or better.

    A sum of products, since ``jnp.vdot`` flattens its arguments, and would gather sharded ones to do so.
    """
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    return jnp.sum(x.astype(wide) * y.astype(wide))
