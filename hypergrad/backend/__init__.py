"""Backends: what an array framework must provide, and what is derived from it."""

from hypergrad.backend.protocol import Backend
from hypergrad.backend.registry import Listing, available, find_backend, get_backend, loaded, registered
from hypergrad.backend.types import Array, Kind, Leaf, Pullback, Push, Scalar, Tree

__all__ = [
    "Array",
    "Backend",
    "Kind",
    "Leaf",
    "Listing",
    "Pullback",
    "Push",
    "Scalar",
    "Tree",
    "available",
    "find_backend",
    "get_backend",
    "loaded",
    "registered",
]
