"""JAX for `hypergrad`: pure functions that ``jax.jit``, ``jax.vmap`` and sharding take as they are."""

from hypergrad_jax.backend import JaxBackend
from hypergrad_jax.optimizers import Optax

__all__ = ["JaxBackend", "Optax"]
