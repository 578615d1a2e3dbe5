"""What a solver is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad import vectors
from hypergrad.arguments import is_number
from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import ArgumentError, Failure

Matvec = Callable[[Tree], Tree]
"""p -> H p, one product."""


class Solution(NamedTuple):
    """What a solver found, and what it saw on the way.

    ``curvature`` is its estimate of the largest eigenvalue of H, NaN if it made none; 2 / curvature is
    the largest stable step of gradient descent. ``failure`` is a code of `Failure`. There is no
    residual here: whoever asks for a solution measures the true one.
    """

    x: Tree
    iterations: Any
    products: Any
    failure: Any = Failure.NONE
    curvature: Scalar = float("nan")


class Solver(ABC):
    """An approximation of x = H⁻¹ v from products with the symmetric H alone.

    ``promises()`` is the relative residual ‖Hx − v‖/‖v‖ above which a solution is a failure; ``None``
    if the solver is a truncation that promises nothing.
    """

    @abstractmethod
    def solve(self, backend: Backend, matvec: Matvec, v: Tree) -> Solution:
        """Solve H x = v from x = 0."""

    @abstractmethod
    def promises(self) -> float | None:
        """The largest relative residual that counts as success."""


def check_steps(solver: str, max_steps: int) -> None:
    """Check a number of iterations.

    Raises:
        ArgumentError: if it is not a positive integer.
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ArgumentError(f"{solver}: max_steps = {max_steps!r}; it is a positive integer")


def check_tolerance(solver: str, rtol: float | None) -> None:
    """Check a relative tolerance.

    Raises:
        ArgumentError: if it is not in (0, 1).
    """
    if rtol is not None and not (is_number(rtol) and 0 < rtol < 1):
        raise ArgumentError(f"{solver}: rtol = {rtol!r}; it is a number between 0 and 1")


def residual(backend: Backend, hx: Tree, v: Tree) -> Scalar:
    """The true relative residual ‖Hx − v‖/‖v‖, 0 where v = 0 and x = 0."""
    xp = backend.xp
    size = vectors.norm(backend, v)
    error = vectors.norm(backend, vectors.subtract(backend, hx, v))
    return error / xp.where(size > 0, size, xp.ones_like(size))
