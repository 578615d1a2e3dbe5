"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import Failure
from hypergrad.solvers.base import Matvec, Solution, Solver, check_steps, check_tolerance


class _Iterate(NamedTuple):
    x: Tree
    r: Tree
    p: Tree
    rr: Scalar
    k: Any
    failure: Any
    curvature: Scalar


@final
@dataclass(frozen=True)
class CG(Solver):
    r"""Conjugate gradients on H itself, which is symmetric (Hestenes and Stiefel 1952).

        α = rᵀr / pᵀHp,   x ← x + α p,   r ← r − α Hp,   p ← r + (r'ᵀr' / rᵀr) p

    For a positive definite H, about √κ/2 · log(2/rtol) products, κ being its condition number. Each
    direction's curvature pᵀHp/pᵀp is tested: below 0 the solve fails with ``negative_curvature``; lost
    in the rounding of the largest curvature met so far, with ``singular``. A test against the scale of
    H itself neither rejects large well-posed systems nor accepts small ill-posed ones.

    Args:
        max_steps: products at most.
        rtol: the relative residual ‖Hx − v‖/‖v‖ to reach.
    """

    max_steps: int = 100
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_steps("CG", self.max_steps)
        check_tolerance("CG", self.rtol)

    def promises(self) -> float | None:
        return self.rtol

    def solve(self, backend: Backend, matvec: Matvec, v: Tree) -> Solution:
        xp = backend.xp
        vv = backend.inner(v, v)
        target = self.rtol**2 * vv
        eps = 10 * float(xp.finfo(vv.dtype).eps)

        def going(it: _Iterate) -> Any:
            return (it.k < self.max_steps) & (it.rr > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            hp = matvec(it.p)
            php, pp = backend.inner(it.p, hp), backend.inner(it.p, it.p)
            stretch = xp.sqrt(backend.inner(hp, hp) / pp)
            largest = xp.maximum(it.curvature, stretch)
            curvature = php / pp
            # For a semidefinite H, pᵀHp = 0 means Hp = 0; where it does not, H is indefinite.
            flat = xp.abs(curvature) <= eps * largest
            null = flat & (stretch <= eps**0.5 * largest)
            failure = xp.where(
                null,
                int(Failure.SINGULAR),
                xp.where(flat | (curvature < 0), int(Failure.NEGATIVE_CURVATURE), int(Failure.NONE)),
            )
            sound = failure == Failure.NONE
            alpha = xp.where(sound, it.rr, 0.0 * it.rr) / xp.where(sound, php, xp.ones_like(php))
            x, r = backend.axpy(alpha, it.p, it.x), backend.axpy(-alpha, hp, it.r)
            rr = backend.inner(r, r)
            p = backend.axpy(rr / it.rr, it.p, r)
            return _Iterate(x, r, p, rr, it.k + 1, failure, largest)

        zero = backend.zeros(v)
        start = _Iterate(zero, v, v, vv, 0, int(Failure.NONE), 0.0 * vv)
        end = backend.while_loop(going, body, start, self.max_steps)
        failure = xp.where(
            (end.failure == Failure.NONE) & (end.rr > target), int(Failure.MAX_STEPS), end.failure
        )
        return Solution(end.x, end.k, end.k, failure, end.curvature)
