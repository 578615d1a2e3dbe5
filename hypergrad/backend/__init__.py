"""What an array framework must say, and what follows from it."""

from hypergrad.backend.protocol import Array, Backend, Kind, Leaf, Pullback, Scalar, Tree
from hypergrad.backend.registry import Listing, available, find_backend, get_backend, loaded, registered

__all__ = [
    "Array",
    "Backend",
    "Kind",
    "Leaf",
    "Listing",
    "Pullback",
    "Scalar",
    "Tree",
    "available",
    "find_backend",
    "get_backend",
    "loaded",
    "registered",
]
