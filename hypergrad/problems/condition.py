r"""The condition G(θ, λ) = 0 that parameters are the solution of, at one point, and products with its
derivatives.

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
    """First-order gradients and second-order products that were taken, and the bytes kept for them."""

    gradients: Scalar
    products: Scalar
    bytes_held: Any = 0


class Condition(NamedTuple):
    """G at a point, averaged over batches."""

    value: Scalar
    """C̃1, or what stands for it."""
    residual: Tree | None
    """G, or ``None`` where nobody knows it."""
    product: Callable[[Tree], Tree]
    """p -> (∂_θ G)ᵀ p."""
    both: Callable[[Tree], Image]
    """x -> (∂_θ G)ᵀ x and (∂_λ G)ᵀ x."""
    reached: Callable[[], Tree]
    """For each hyperparameter: does G depend on it?"""
    spent: Callable[[Scalar], Spent]
    """What so many products of a solve have cost, one call of ``both`` and a gradient of C2 included."""
