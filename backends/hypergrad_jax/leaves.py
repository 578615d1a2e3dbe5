"""Leaves of JAX trees: which to differentiate by, and what stands for nothing."""

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


def zeros(leaf: Any) -> Any:
    """The cotangent of a leaf that nothing depends on; keys have none, and stand for themselves."""
    if is_key(leaf):
        return leaf
    return jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else type(leaf)(0)
