"""Torch and JAX, where they are installed."""

from importlib import import_module

from support.frameworks import BACKENDS

torch, jax = (import_module(name) if name in BACKENDS else None for name in ("torch", "jax"))
