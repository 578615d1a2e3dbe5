r"""The condition G(θ, λ) = 0 that parameters satisfy, at one point, and products with its derivatives.

    G = ∇_θ C̃1          an optimum
    G = θ − φ(θ, λ)     a fixed point: of a map, or of training by an update rule Φ

By the implicit function theorem dC2/dλ = ∂_λ C2 − (∂_λ G)ᵀ x with (∂_θ G)ᵀ x = ∂_θ C2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad.backend import Scalar, Tree
from hypergrad.solvers.system import Image


class Spent(NamedTuple):
    """First-order gradients and second-order products that were computed, and the bytes held for them."""

    gradients: Scalar
    products: Scalar
    bytes_held: Any = 0


class Condition(NamedTuple):
    """G at a point, averaged over batches."""

    value: Scalar
    """C̃1, or the value that is reported in its place."""
    residual: Tree | None
    """G, or ``None`` if the user has not given it."""
    product: Callable[[Tree], Tree]
    """p -> (∂_θ G)ᵀ p."""
    both: Callable[[Tree], Image]
    """x -> (∂_θ G)ᵀ x and (∂_λ G)ᵀ x."""
    reached: Callable[[], Tree]
    """For each hyperparameter: does G depend on it?"""
    spent: Callable[[Scalar], Spent]
    """The number of products in a solve -> the cost, including one call of ``both`` and a gradient of C2."""
