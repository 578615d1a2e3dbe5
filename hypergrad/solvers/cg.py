"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Scalar, Tree
from hypergrad.errors import Failure
from hypergrad.solvers.base import (
    Krylov,
    Solver,
    check_preconditioner,
    nan_if_infinite,
    prepare,
    rounding,
)
from hypergrad.solvers.numbers import on_numpy_scalars
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
class CG(Krylov):
    r"""Conjugate gradients, for a symmetric positive definite A (Hestenes and Stiefel 1952).

        α = rᵀz / pᵀAp,   x ← x + α p,   r ← r − α Ap,   z = M r,   p ← z + (r'ᵀz' / rᵀz) p

    where r' and z' are the new r and z.

    Takes about √κ/2 · log(2/rtol) products, where κ is the condition number of A, or of MA with a
    preconditioner M ≈ A⁻¹. The curvature pᵀAp/pᵀp of each direction is tested: the solve fails with
    ``negative_curvature`` if it is negative, and with ``singular`` if it is within rounding error of 0,
    relative to the largest curvature so far. Being relative to the scale of A, the test neither rejects large
    well-posed systems nor accepts small ill-posed ones.

    Args:
        max_steps, rtol, atol: see `Krylov`; by default at most min(2n, 1000) products, not counting those of
            the preconditioner. ``CG(5, rtol=None)`` is the solver of Rajeswaran et al. 2019 (iMAML).
        preconditioner: M: `Nystrom`, `Diagonal`, or a function p -> M p of trees, symmetric and positive
            definite.
    """

    fewest: ClassVar[int] = 1

    preconditioner: Any = None

    def __post_init__(self) -> None:
        Krylov.__post_init__(self)
        check_preconditioner("CG", self.preconditioner)

    @property
    def needs_symmetry(self) -> bool:
        return True

    def for_one_system(self, system: System) -> tuple[Solver, Any]:
        m = prepare(self.preconditioner, system)
        return (replace(self, preconditioner=m.apply) if self.preconditioner else self), m.products

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system, m = system.begun(), prepare(self.preconditioner, system)
        largest = system.backend.xp.where(m.curvature > system.curvature, m.curvature, system.curvature)
        solution = self._descend(replace(system, curvature=largest), m.apply)
        return solution._replace(products=solution.products + m.products + system.spent)

    @on_numpy_scalars
    def _descend(self, system: System, precondition: Callable[[Tree], Tree]) -> Solution:
        backend, product, limit = system.backend, system.product, self.limit(system)
        xp, axpy, inner = backend.xp, backend.axpy, backend.inner
        target = self.target(system) ** 2
        negligible = 10 * rounding(backend, target)

        def going(it: _Iterate) -> Any:
            return (it.k < limit) & (it.rr > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            ap = product(it.p)
            pap, pp = inner(it.p, ap), inner(it.p, it.p)
            stretch, curvature = xp.sqrt(inner(ap, ap) / pp), pap / pp
            largest = xp.maximum(it.curvature, stretch)
            # For a semidefinite A, ‖Ap‖² ≤ ‖A‖ pᵀAp: if pᵀAp = 0 and Ap ≠ 0, A is indefinite. ‖A‖ is likely
            # less than ten times ``largest``, even where a preconditioner changes the directions.
            flat = xp.abs(curvature) <= negligible * largest
            singular = flat & (stretch <= 10 * negligible**0.5 * largest)
            failure = xp.where(
                singular,
                int(Failure.SINGULAR),
                xp.where(flat | (curvature < 0), int(Failure.NEGATIVE_CURVATURE), int(Failure.NONE)),
            )
            sound = failure == Failure.NONE
            # pᵀr = rᵀz, unless the solve resumes with an old direction and a residual measured since.
            pr = inner(it.p, it.r)
            alpha = xp.where(sound, pr, 0.0 * pr) / xp.where(sound, pap, xp.ones_like(pap))
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
        p, largest = z, 0.0 * rr + system.curvature
        if system.direction is not None:
            missing = inner(system.direction, system.direction) == 0
            p = backend.map(lambda fresh, old: xp.where(missing, fresh, old), z, system.direction)
        start = _Iterate(system.x, r, p, rz, rr, 0, int(Failure.NONE), largest, 0.0 * rr + float("inf"))
        end = self.iterate(system, going, body, start, limit)
        failure = self.final_failure(system, end.failure, end.rr > target)
        return Solution(
            end.x,
            end.k,
            end.k,
            failure,
            end.curvature,
            nan_if_infinite(backend, end.smallest),
            direction=end.p,
        )
