"""The minimal residual method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Scalar, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers.base import Krylov, nan_if_infinite, rounding
from hypergrad.solvers.numbers import on_numpy_scalars
from hypergrad.solvers.system import Solution, System


class _Iterate(NamedTuple):
    x: Tree
    q: Tree
    q_before: Tree
    w: Tree
    w_before: Tree
    beta: Scalar
    cos: Scalar
    sin: Scalar
    delta: Scalar
    epsilon: Scalar
    size: Scalar
    k: Any
    failure: Any
    curvature: Scalar
    smallest: Scalar


@final
@dataclass(frozen=True)
class MINRES(Krylov):
    r"""Minimal residuals on a symmetric H, definite or not (Paige and Saunders 1975).

        x_k = argmin ‖Hx − v‖ over the Krylov space of v,     H Q_k = Q_{k+1} T_k by Lanczos

    One rotation per iteration reduces T to triangular form, so seven vectors are enough. Use it where
    θ is a stationary point but not a minimum, as in a game: negative curvature is not a failure here. If only
    a least-squares solution exists, with a residual H r = 0, the solver returns it and reports ``singular``.

    Args:
        max_steps, rtol, atol: see `Krylov`.
    """

    @property
    def needs_symmetry(self) -> bool:
        return True

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = system.begun()
        solution = self._lanczos(system)
        return solution._replace(products=solution.products + system.spent)

    @on_numpy_scalars
    def _lanczos(self, system: System) -> Solution:
        backend, product, limit = system.backend, system.product, self.limit(system)
        xp, axpy, inner = backend.xp, backend.axpy, backend.inner
        target = self.target(system)
        # ‖Hr‖/(‖H‖‖r‖) is 0 at a least-squares solution, but rounding keeps it near √ε in Lanczos. For a
        # regular H it is above 1/κ, and beyond κ = 1/√ε the error ε κ² leaves MINRES no correct digit.
        eps = rounding(backend, target)
        negligible = eps**0.5
        size = vectors.norm(backend, system.r)
        one, zero = xp.ones_like(size), 0.0 * size

        def going(it: _Iterate) -> Any:
            return (it.k < limit) & (it.size > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            hq = product(it.q)
            alpha, stretch = inner(it.q, hq), vectors.norm(backend, hq)
            largest = xp.maximum(it.curvature, stretch)
            y = axpy(-it.beta, it.q_before, axpy(-alpha, it.q, hq))
            beta = vectors.norm(backend, y)
            # Apply the last rotation to the new column of T, and a new rotation that eliminates beta.
            low, bar = it.cos * it.delta + it.sin * alpha, it.sin * it.delta - it.cos * alpha
            epsilon, delta = it.sin * beta, -it.cos * beta
            slope = xp.sqrt(bar * bar + delta * delta)  # ‖H r‖ / ‖r‖ before this step
            gamma = xp.sqrt(bar * bar + beta * beta)
            smallest = xp.minimum(it.smallest, xp.minimum(slope, gamma))
            singular = slope <= negligible * largest
            regular = ~singular & (gamma > 0)
            gamma = xp.where(regular, gamma, one)
            cos, sin = bar / gamma, beta / gamma
            step = xp.where(regular, cos * it.size, zero)
            w = vectors.scale(backend, 1.0 / gamma, axpy(-low, it.w, axpy(-it.epsilon, it.w_before, it.q)))
            # If the Krylov space cannot grow, the remaining residual cannot be reduced.
            grown = beta > 10 * eps * largest
            left = xp.where(regular, xp.abs(sin) * it.size, it.size)
            stuck = ~regular | (~grown & ~(left <= target))
            q = vectors.scale(backend, xp.where(grown, one, zero) / xp.where(grown, beta, one), y)
            return _Iterate(
                axpy(step, w, it.x),
                q,
                it.q,
                w,
                it.w,
                beta,
                cos,
                sin,
                delta,
                epsilon,
                left,
                it.k + 1,
                xp.where(stuck, int(Failure.SINGULAR), int(Failure.NONE)),
                largest,
                smallest,
            )

        zeros = backend.zeros(system.v)
        q = vectors.scale(backend, one / xp.where(size > 0, size, one), system.r)
        start = _Iterate(
            system.x, q, zeros, zeros, zeros, zero, -one, zero, zero, zero, size, 0,
            int(Failure.NONE), zero + system.curvature, zero + float("inf"),
        )  # fmt: skip
        end = self.iterate(system, going, body, start, limit)
        failure = self.final_failure(system, end.failure, end.size > target)
        return Solution(end.x, end.k, end.k, failure, end.curvature, nan_if_infinite(backend, end.smallest))
