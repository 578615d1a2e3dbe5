"""Compiled loops that keep rows and stop early, and compiled branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from hypergrad.backend import Tree
from hypergrad.backend.loops import Loops
from hypergrad.errors import ArgumentError


class JaxLoops(Loops):
    """Loops of ``jax.lax``. Rows are one tree whose leaves have one more axis, the first."""

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
        """By `lax.while_loop`: each row is written into an array of ``limit`` rows, which XLA does in place.

        The body is traced once. Under ``jax.vmap`` a member of the batch that has stopped does not change.
        """
        carry = jax.tree_util.tree_map(jnp.asarray, carry)
        program, shapes = jax.make_jaxpr(body, return_shape=True)(carry, jnp.asarray(0))
        run, structure = jaxpr_as_fun(program), jax.tree_util.tree_structure(shapes)
        _, row, last, _ = shapes
        rows = jax.tree_util.tree_map(lambda x: _blank(x, limit), row)

        def going(state: tuple[Any, ...]) -> Any:
            return state[4] & (state[3] < limit)

        def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
            carry, rows, _, k, _ = state
            carry, row, last, more = jax.tree_util.tree_unflatten(
                structure, run(*jax.tree_util.tree_leaves((carry, k)))
            )
            rows = jax.tree_util.tree_map(lambda kept, new: kept.at[k].set(new), rows, row)
            return carry, rows, last, k + 1, jnp.asarray(more)

        start = (carry, rows, jax.tree_util.tree_map(_blank, last), jnp.asarray(0), jnp.asarray(True))
        carry, rows, last, count, _ = lax.while_loop(going, step, start)
        return carry, rows, last, count

    def cond(self, pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
        if self.backend.readable(pred):
            return yes() if pred else no()
        shapes = jax.eval_shape(yes)

        def fill(given: Any, wanted: Tree) -> Tree:
            if given is None:
                return jax.tree_util.tree_map(_blank, wanted)
            return given if isinstance(given, jax.Array) else jnp.asarray(given, wanted.dtype)

        return lax.cond(
            pred,
            lambda: jax.tree_util.tree_map(jnp.asarray, yes()),
            lambda: jax.tree_util.tree_map(fill, no(), shapes, is_leaf=lambda x: x is None),
        )

    def each(self, f: Callable[..., Tree], *items: Any) -> Any:
        return jax.vmap(f)(*items)

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(f)

    def callback(self, listener: Callable[..., None], *values: Any) -> None:
        jax.debug.callback(listener, *values)

    def stack(self, items: Sequence[Tree]) -> Tree:
        try:
            return jax.tree_util.tree_map(_rows, *items)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                "the batches of a list differ in structure or shape, and a compiled loop takes those of one "
                f"kind: drop the odd one, or pass an iterator ({error})"
            ) from error

    def take(self, items: Tree, k: Any) -> Tree:
        return jax.tree_util.tree_map(lambda leaf: leaf[k], items)

    def empty_rows(self, like: Tree, count: int) -> Tree:
        return jax.tree_util.tree_map(
            lambda leaf: jnp.zeros((count, *jnp.shape(leaf)), jnp.result_type(leaf)), like
        )

    def set_row(self, items: Tree, k: Any, item: Tree) -> Tree:
        return jax.tree_util.tree_map(lambda kept, leaf: kept.at[k].set(leaf), items, item)

    def dense(self, rows: Tree) -> Tree:
        return rows

    def collect(self, rows: Any) -> Tree:
        rows = (
            jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *rows)
            if isinstance(rows, list)
            else rows
        )
        return jax.tree_util.tree_map(lambda x: x if isinstance(x, jax.core.Tracer) else np.asarray(x), rows)


def _blank(like: Any, *rows: int) -> jax.Array:
    """An array, or rows of such, to be overwritten: NaN, or 0 for dtypes without NaN."""
    nothing = jnp.nan if jnp.issubdtype(like.dtype, jnp.floating) else 0
    return jnp.full((*rows, *like.shape), nothing, like.dtype)


def _rows(*leaves: Any) -> jax.Array:
    """Stack leaves; those of the host before they become an array, which adds one constant to a program."""
    on_host = all(isinstance(leaf, bool | int | float | np.ndarray | np.generic) for leaf in leaves)
    return jnp.asarray(np.stack(leaves)) if on_host else jnp.stack(leaves)
