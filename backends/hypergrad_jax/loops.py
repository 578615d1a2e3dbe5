"""Compiled loops that keep rows and may stop early, or take little memory, and choices between two ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from hypergrad.backend import Tree
from hypergrad.backend.eager import blocks


def repeat(
    body: Callable[[Tree, Any], tuple[Tree, Tree, Tree, Any]], carry: Tree, limit: int
) -> tuple[Tree, Tree, Tree, Any]:
    """Run ``carry, row, last, going = body(carry, k)`` while it is going, by `lax.while_loop`.

    Each row is written into its place, where XLA makes no copies. The body is traced once. Under ``jax.vmap``
    every member of the batch stands still where it stopped.
    """
    carry = jax.tree_util.tree_map(jnp.asarray, carry)
    program, shapes = jax.make_jaxpr(body, return_shape=True)(carry, jnp.asarray(0))
    run, structure = jaxpr_as_fun(program), jax.tree_util.tree_structure(shapes)
    _, row, last, _ = shapes
    rows = jax.tree_util.tree_map(lambda x: blank(x, limit), row)

    def going(state: tuple[Any, ...]) -> Any:
        return state[4] & (state[3] < limit)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        carry, rows, _, k, _ = state
        carry, row, last, more = jax.tree_util.tree_unflatten(
            structure, run(*jax.tree_util.tree_leaves((carry, k)))
        )
        rows = jax.tree_util.tree_map(lambda kept, new: kept.at[k].set(new), rows, row)
        return carry, rows, last, k + 1, jnp.asarray(more)

    start = (carry, rows, jax.tree_util.tree_map(blank, last), jnp.asarray(0), jnp.asarray(True))
    carry, rows, last, count, _ = lax.while_loop(going, step, start)
    return carry, rows, last, count


def elementwise(
    f: Callable[..., tuple[Sequence[Any], Any]], used: Sequence[Any], given: Sequence[Any]
) -> tuple[list[Any], Any]:
    """In blocks on the CPU, where XLA fuses no two results, and keeps whole arrays of what they share.

    Elsewhere it does; and arrays that lie on many devices are not to be cut.
    """
    shape = [*used, *given][0].shape
    count = blocks(shape) if jax.default_backend() == "cpu" and jax.device_count() == 1 else 1
    count = next(n for n in range(count, 0, -1) if n == 1 or shape[0] % n == 0)
    if count == 1:
        new, sums = f(*used, *given)
        return list(new), sums
    rows = shape[0] // count

    def part(k: Any, x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, k * rows, rows)

    def step(carry: Any, k: Any) -> tuple[Any, None]:
        used, totals = carry
        new, sums = f(*(part(k, x) for x in (*used, *given)))
        used = [lax.dynamic_update_slice_in_dim(x, y, k * rows, 0) for x, y in zip(used, new, strict=True)]
        return (used, jax.tree_util.tree_map(jnp.add, totals, sums)), None

    shapes = jax.eval_shape(lambda *xs: f(*xs)[1], *(part(0, x) for x in (*used, *given)))
    begin = [*used], jax.tree_util.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(step, begin, jnp.arange(count))[0]


def either(pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
    """`lax.cond`, where ``no`` may leave out what only ``yes`` has."""
    shapes = jax.eval_shape(yes)

    def other() -> Tree:
        def fill(given: Any, wanted: Tree) -> Tree:
            if given is None:
                return jax.tree_util.tree_map(blank, wanted)
            return given if isinstance(given, jax.Array) else jnp.asarray(given, wanted.dtype)

        return jax.tree_util.tree_map(fill, no(), shapes, is_leaf=lambda x: x is None)

    return lax.cond(pred, lambda: jax.tree_util.tree_map(jnp.asarray, yes()), other)


def blank(like: Any, *rows: int) -> jax.Array:
    """An array that means nothing, or rows of such: NaN, or 0 where there is none."""
    nothing = jnp.nan if jnp.issubdtype(like.dtype, jnp.floating) else 0
    return jnp.full((*rows, *like.shape), nothing, like.dtype)
