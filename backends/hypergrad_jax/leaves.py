"""Leaves of JAX trees: which ones to differentiate by, and zero cotangents."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def is_float(leaf: Any) -> bool:
    """Is this leaf one to differentiate by?"""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_key(leaf: Any) -> bool:
    """Is this a typed PRNG key, ``jax.random.key(0)``?"""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def tied(tree: Any) -> Any:
    """The same values, where every leaf depends on all of them: 0 times their sum is added."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(tree) if is_float(leaf)]
    if len(leaves) < 2:
        return tree
    nothing = sum((0.0 * jnp.sum(leaf) for leaf in leaves), jnp.zeros((), leaves[0].dtype))
    return jax.tree_util.tree_map(lambda x: x + nothing.astype(x.dtype) if is_float(x) else x, tree)


def zeros(leaf: Any) -> Any:
    """The cotangent of a leaf that nothing depends on. A PRNG key has none, and is returned itself."""
    if is_key(leaf):
        return leaf
    return jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else type(leaf)(0)
