"""The minimal residual method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers.base import Solution, Solver, System, check_steps, check_tolerance, met, rounding
from hypergrad.solvers.numbers import on_numbers


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
class MINRES(Solver):
    r"""Minimal residuals on a symmetric H, definite or not (Paige and Saunders 1975).

        x_k = argmin ‖Hx − v‖ over the Krylov space of v,     H Q_k = Q_{k+1} T_k by Lanczos

    T is reduced to triangular form by one rotation a step, so that three vectors are all that it keeps. Use
    it where θ is a stationary point but no minimum, as in a game: negative curvature is no failure here. A
    least-squares solution with a residual left, H r = 0, is found and called ``singular``.

    Args:
        max_steps: products at most.
        rtol: the relative residual ‖Hx − v‖/‖v‖ to reach,
        atol: or the residual itself.
    """

    needs_symmetry: ClassVar[bool] = True

    max_steps: int = 100
    rtol: float = 1e-6
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_steps("MINRES", self.max_steps)
        check_tolerance("MINRES", self.rtol, self.atol)

    @on_numbers
    def solve(self, backend: Backend, system: System) -> Solution:
        xp, axpy, inner = backend.xp, backend.axpy, backend.inner
        target = self.target(backend, system)
        # ‖Hr‖/(‖H‖‖r‖) is 0 at a least-squares solution, to which rounding lets Lanczos come as near as √ε.
        # Where H is regular it is above 1/κ, and beyond κ = 1/√ε an error of ε κ² leaves MINRES no digit.
        eps = rounding(backend, target)
        lost = eps**0.5
        size = vectors.norm(backend, system.r)
        one, zero = xp.ones_like(size), 0.0 * size

        def going(it: _Iterate) -> Any:
            return (it.k < self.max_steps) & (it.size > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            hq = system.product(it.q, it.k)
            alpha, stretch = inner(it.q, hq), vectors.norm(backend, hq)
            largest = xp.maximum(it.curvature, stretch)
            y = axpy(-it.beta, it.q_before, axpy(-alpha, it.q, hq))
            beta = vectors.norm(backend, y)
            # The last rotation on the new column of T, and a new one that annuls beta.
            low, bar = it.cos * it.delta + it.sin * alpha, it.sin * it.delta - it.cos * alpha
            epsilon, delta = it.sin * beta, -it.cos * beta
            slope = xp.sqrt(bar * bar + delta * delta)  # ‖H r‖ / ‖r‖ before this step
            gamma = xp.sqrt(bar * bar + beta * beta)
            smallest = xp.minimum(it.smallest, xp.minimum(slope, gamma))
            null = slope <= lost * largest
            fine = ~null & (gamma > 0)
            gamma = xp.where(fine, gamma, one)
            cos, sin = bar / gamma, beta / gamma
            step = xp.where(fine, cos * it.size, zero)
            w = vectors.scale(backend, 1.0 / gamma, axpy(-low, it.w, axpy(-it.epsilon, it.w_before, it.q)))
            # Where the Krylov space closes, what is left of the residual is out of reach.
            grown = beta > 10 * eps * largest
            left = xp.where(fine, xp.abs(sin) * it.size, it.size)
            stuck = ~fine | (~grown & ~(left <= target))
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

        nothing = backend.zeros(system.v)
        q = vectors.scale(backend, one / xp.where(size > 0, size, one), system.r)
        start = _Iterate(
            system.x, q, nothing, nothing, nothing, zero, -one, zero, zero, zero, size, 0,
            int(Failure.NONE), zero + system.met, zero + float("inf"),
        )  # fmt: skip
        end = backend.while_loop(going, body, start, self.max_steps)
        failure = xp.where(
            (end.failure == Failure.NONE) & (end.size > target), int(Failure.MAX_STEPS), end.failure
        )
        smallest = met(backend, end.smallest)
        return Solution(end.x, end.k, end.k, failure, end.curvature, smallest=smallest)
