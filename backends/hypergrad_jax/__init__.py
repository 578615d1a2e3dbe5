"""JAX for `hypergrad`: pure functions that ``jax.jit``, ``jax.vmap`` and sharding take as they are."""

from dataclasses import fields

from jax.tree_util import register_dataclass

from hypergrad.tuning.history import History
from hypergrad_jax.backend import JaxBackend
from hypergrad_jax.optimizers import Optax

__all__ = ["JaxBackend", "Optax"]

# A run that is compiled or mapped returns its history.
register_dataclass(History, data_fields=[column.name for column in fields(History)], meta_fields=[])
