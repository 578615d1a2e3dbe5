"""Arrays in the host's memory, and work in blocks on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hypergrad.backend import Array, Tree
from hypergrad.backend.memory import Memory, blocks


class JaxMemory(Memory):
    """Memory spaces of JAX, and blocks by `lax.scan`."""

    def to_host(self, tree: Tree) -> Tree:
        return self.backend.map(partial(_move, "Host"), tree)

    def from_host(self, tree: Tree) -> Tree:
        return self.backend.map(partial(_move, "Device"), tree)

    def in_blocks(
        self, f: Callable[..., tuple[Sequence[Array], Any]], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        """In blocks on one CPU, where XLA does not fuse computations with several results, and would keep
        intermediate arrays in full.

        On other devices XLA fuses them. Arrays on several devices are not cut.
        """
        shape = [*used, *given][0].shape
        count = blocks(shape) if jax.default_backend() == "cpu" and jax.device_count() == 1 else 1
        count = next(n for n in range(count, 0, -1) if n == 1 or shape[0] % n == 0)
        if count == 1:
            return super().in_blocks(f, used, given)
        rows = shape[0] // count

        def part(k: Any, x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, k * rows, rows)

        def step(carry: Any, k: Any) -> tuple[Any, None]:
            used, totals = carry
            new, sums = f(*(part(k, x) for x in (*used, *given)))
            used = [
                lax.dynamic_update_slice_in_dim(x, y, k * rows, 0) for x, y in zip(used, new, strict=True)
            ]
            return (used, jax.tree_util.tree_map(jnp.add, totals, sums)), None

        shapes = jax.eval_shape(lambda *xs: f(*xs)[1], *(part(0, x) for x in (*used, *given)))
        begin = [*used], jax.tree_util.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return lax.scan(step, begin, jnp.arange(count))[0]


def _move(space: str, leaf: Any) -> Any:
    """A leaf in the memory space given, ``"Host"`` or ``"Device"``; the leaf itself on a CPU."""
    if jax.default_backend() == "cpu" or not isinstance(leaf, jax.Array) or not hasattr(jax, "memory"):
        return leaf
    return jax.device_put(leaf, getattr(jax.memory.Space, space))
