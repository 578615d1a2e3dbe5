"""Damping that finds its own size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers import Solution


class Damped(NamedTuple):
    """The δ with which a solve succeeds, or the last that was tried, and how it went.

    That is x, the failure, the smallest curvature met, and what the trials cost.
    """

    damping: Scalar
    x: Tree
    failure: Any
    smallest: Scalar
    products: Any
    iterations: Any


@final
@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""As little damping δ as the solve of (H + δI) x = v succeeds with (Levenberg 1944, Marquardt 1963).

        δ ← factor · δ    after a solve that failed, which then begins again
        δ ← δ / factor    for the next estimate, after one that succeeded

    A fixed δ large enough for the worst Hessian of a run biases all the others; this one follows, and is
    carried on in the state. What counts as a failure is what `SolveError` would say: negative curvature, a
    singular H, a residual above ``rtol`` after ``max_steps``. The report gives the δ used.

    Args:
        initial: δ of the first estimate.
        factor: more than 1.
        smallest: δ is never below it.
        attempts: solves at most in one estimate; after the last, a failure is one.

    Raises:
        ArgumentError: for numbers out of range.
    """

    initial: float = 1e-4
    factor: float = 10.0
    smallest: float = 1e-10
    attempts: int = 12

    def __post_init__(self) -> None:
        sizes = self.initial, self.factor, self.smallest
        fine = all(is_number(x) and 0 < x < float("inf") for x in sizes)
        if not (fine and self.factor > 1 and self.smallest <= self.initial):
            raise ArgumentError(f"{self!r}: it takes 0 < smallest <= initial, and factor > 1")
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ArgumentError(f"LevenbergMarquardt: attempts = {self.attempts!r}; it is a positive integer")

    def search(
        self, backend: Backend, solve: Callable[[Scalar], Solution], damping: Scalar, x: Tree
    ) -> Damped:
        """Try from this δ upwards; ``solve`` tells how it went, by its true residual. x is of its kind."""
        xp = backend.xp

        def going(carry: tuple[Any, ...]) -> Any:
            return (carry[1] != int(Failure.NONE)) & (carry[6] < self.attempts)

        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            damping, _, _, _, products, iterations, tried = carry
            damping = xp.where(tried > 0, self.factor * damping, damping)
            found = solve(damping)
            # One product more, to judge it by.
            products = products + found.products + 1
            iterations = iterations + found.iterations
            return damping, found.failure, found.x, found.smallest, products, iterations, tried + 1

        start = damping, int(Failure.MAX_STEPS), x, float("nan") * damping, 0, 0, 0
        end = backend.while_loop(going, body, start, self.attempts)
        damping, failure, x, smallest, products, iterations, _ = end
        return Damped(damping, x, failure, smallest, products, iterations)

    def after(self, backend: Backend, damping: Scalar, failure: Any) -> Scalar:
        """δ of the next estimate, after one that ended with this failure."""
        xp = backend.xp
        failed = failure != int(Failure.NONE)
        return xp.where(failed, damping, xp.maximum(damping / self.factor, self.smallest + 0.0 * damping))
