"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

from hypergrad.backend import Scalar, Tree
from hypergrad.errors import Failure
from hypergrad.solvers.base import (
    Iterative,
    Solver,
    check_count,
    check_preconditioner,
    check_tolerance,
    met,
    prepare,
    rounding,
)
from hypergrad.solvers.numbers import on_numbers
from hypergrad.solvers.system import Solution, System


class _Iterate(NamedTuple):
    x: Tree
    r: Tree
    p: Tree
    rz: Scalar
    rr: Scalar
    k: Any
    failure: Any
    curvature: Scalar
    smallest: Scalar


@final
@dataclass(frozen=True)
class CG(Iterative):
    r"""Conjugate gradients on A itself, which is symmetric (Hestenes and Stiefel 1952).

        α = rᵀz / pᵀAp,   x ← x + α p,   r ← r − α Ap,   z = M r,   p ← z + (r'ᵀz' / rᵀz) p

    For a positive definite A, about √κ/2 · log(2/rtol) products, κ being its condition number, or that of
    MA with a preconditioner M ≈ A⁻¹. Each direction's curvature pᵀAp/pᵀp is tested: below 0 the solve fails
    with ``negative_curvature``; lost in the rounding of the largest curvature met so far, with ``singular``.
    A test against the scale of A itself neither rejects large well-posed systems nor accepts small ill-posed
    ones.

    Args:
        max_steps: products at most, those of the preconditioner not counted; by default min(2n, 1000) for n
            unknowns.
        rtol: the relative residual ‖Ax − v‖/‖v‖ to reach; ``None`` takes ``max_steps`` products and promises
            nothing (five of them are the estimator of Rajeswaran et al. 2019, iMAML),
        atol: or the residual itself.
        preconditioner: M, by `Nystrom`, `Diagonal`, or a function p -> M p of trees, symmetric and positive
            definite.
    """

    max_steps: int | None = None
    rtol: float | None = 1e-6
    atol: float = 0.0
    preconditioner: Any = None

    def __post_init__(self) -> None:
        check_count("CG", "max_steps", self.max_steps, optional=True)
        check_tolerance("CG", self.rtol, self.atol)
        check_preconditioner("CG", self.preconditioner)

    @property
    def needs_symmetry(self) -> bool:
        return True

    def for_one_system(self, system: System) -> tuple[Solver, Any]:
        made = prepare(self.preconditioner, system)
        return (replace(self, preconditioner=made.apply) if self.preconditioner else self), made.products

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system, made = system.begun(), prepare(self.preconditioner, system)
        largest = system.backend.xp.where(made.curvature > system.met, made.curvature, system.met)
        solution = self._descend(replace(system, met=largest), made.apply)
        return solution._replace(products=solution.products + made.products + system.spent)

    @on_numbers
    def _descend(self, system: System, precondition: Callable[[Tree], Tree]) -> Solution:
        backend, product, limit = system.backend, system.product, self.limit(system)
        xp, axpy, inner = backend.xp, backend.axpy, backend.inner
        target = self.target(system) ** 2
        lost = 10 * rounding(backend, target)

        def going(it: _Iterate) -> Any:
            return (it.k < limit) & (it.rr > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            ap = product(it.p)
            pap, pp = inner(it.p, ap), inner(it.p, it.p)
            stretch, curvature = xp.sqrt(inner(ap, ap) / pp), pap / pp
            largest = xp.maximum(it.curvature, stretch)
            # For a semidefinite A, ‖Ap‖² ≤ ‖A‖ pᵀAp: where pᵀAp = 0 and Ap ≠ 0, A is indefinite. Of ‖A‖ more
            # than a tenth is likely to have been met, by directions that a preconditioner may have bent.
            flat = xp.abs(curvature) <= lost * largest
            null = flat & (stretch <= 10 * lost**0.5 * largest)
            failure = xp.where(
                null,
                int(Failure.SINGULAR),
                xp.where(flat | (curvature < 0), int(Failure.NEGATIVE_CURVATURE), int(Failure.NONE)),
            )
            sound = failure == Failure.NONE
            # pᵀr is rᵀz, but for a direction that a solve goes on in, and a residual that was measured since.
            along = inner(it.p, it.r)
            alpha = xp.where(sound, along, 0.0 * along) / xp.where(sound, pap, xp.ones_like(pap))
            x, r = axpy(alpha, it.p, it.x), axpy(-alpha, ap, it.r)
            z = precondition(r)
            rr = inner(r, r)
            rz = rr if z is r else inner(r, z)
            p = axpy(rz / it.rz, it.p, z)
            smallest = xp.minimum(it.smallest, xp.abs(curvature))
            return _Iterate(x, r, p, rz, rr, it.k + 1, failure, largest, smallest)

        r, z = system.r, precondition(system.r)
        rr = inner(r, r)
        rz = rr if z is r else inner(r, z)
        p, largest = z, 0.0 * rr + system.met
        if system.direction is not None:
            none = inner(system.direction, system.direction) == 0
            p = backend.map(lambda fresh, old: xp.where(none, fresh, old), z, system.direction)
        start = _Iterate(system.x, r, p, rz, rr, 0, int(Failure.NONE), largest, 0.0 * rr + float("inf"))
        end = self.iterate(system, going, body, start, limit)
        failure = self.ended(system, end.failure, end.rr > target)
        return Solution(
            end.x, end.k, end.k, failure, end.curvature, met(backend, end.smallest), direction=end.p
        )
