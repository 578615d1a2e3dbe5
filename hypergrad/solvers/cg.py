"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import Failure
from hypergrad.solvers.base import (
    Solution,
    Solver,
    System,
    check_preconditioner,
    check_steps,
    check_tolerance,
    met,
    prepare,
    rounding,
)
from hypergrad.solvers.numbers import on_numbers


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
class CG(Solver):
    r"""Conjugate gradients on H itself, which is symmetric (Hestenes and Stiefel 1952).

        α = rᵀz / pᵀHp,   x ← x + α p,   r ← r − α Hp,   z = M r,   p ← z + (r'ᵀz' / rᵀz) p

    For a positive definite H, about √κ/2 · log(2/rtol) products, κ being its condition number, or that of
    MH with a preconditioner M ≈ H⁻¹. Each direction's curvature pᵀHp/pᵀp is tested: below 0 the solve fails
    with ``negative_curvature``; lost in the rounding of the largest curvature met so far, with ``singular``.
    A test against the scale of H itself neither rejects large well-posed systems nor accepts small ill-posed
    ones.

    Args:
        max_steps: products at most, those of the preconditioner not counted.
        rtol: the relative residual ‖Hx − v‖/‖v‖ to reach,
        atol: or the residual itself.
        preconditioner: M, by `Nystrom`, `Diagonal`, or a function p -> M p of trees, symmetric and positive
            definite.
    """

    needs_symmetry: ClassVar[bool] = True

    max_steps: int = 100
    rtol: float = 1e-6
    atol: float = 0.0
    preconditioner: Any = None

    def __post_init__(self) -> None:
        check_steps("CG", self.max_steps)
        check_tolerance("CG", self.rtol, self.atol)
        check_preconditioner("CG", self.preconditioner)

    def prepared(self, backend: Backend, system: System) -> tuple[Solver, Any]:
        made = prepare(self.preconditioner, backend, system)
        return (replace(self, preconditioner=made.apply) if self.preconditioner else self), made.products

    def solve(self, backend: Backend, system: System) -> Solution:
        made = prepare(self.preconditioner, backend, system)
        seen = backend.xp.where(made.curvature > system.met, made.curvature, system.met)
        solution = self._descend(backend, system._replace(met=seen), made.apply)
        return solution._replace(products=solution.products + made.products)

    @on_numbers
    def _descend(self, backend: Backend, system: System, precondition: Callable[[Tree], Tree]) -> Solution:
        xp, inner = backend.xp, backend.inner
        target = self.target(backend, system) ** 2
        lost = 10 * rounding(backend, target)

        def going(it: _Iterate) -> Any:
            return (it.k < self.max_steps) & (it.rr > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            hp = system.product(it.p, it.k)
            php, pp = inner(it.p, hp), inner(it.p, it.p)
            stretch, curvature = xp.sqrt(inner(hp, hp) / pp), php / pp
            largest = xp.maximum(it.curvature, stretch)
            # For a semidefinite H, ‖Hp‖² ≤ ‖H‖ pᵀHp: where pᵀHp = 0 and Hp ≠ 0, H is indefinite. Of ‖H‖ more
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
            alpha = xp.where(sound, along, 0.0 * along) / xp.where(sound, php, xp.ones_like(php))
            x, r = backend.axpy(alpha, it.p, it.x), backend.axpy(-alpha, hp, it.r)
            z = precondition(r)
            rr = inner(r, r)
            rz = rr if z is r else inner(r, z)
            p = backend.axpy(rz / it.rz, it.p, z)
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
        end = backend.while_loop(going, body, start, self.max_steps)
        failure = xp.where(
            (end.failure == Failure.NONE) & (end.rr > target), int(Failure.MAX_STEPS), end.failure
        )
        smallest = met(backend, end.smallest)
        return Solution(end.x, end.k, end.k, failure, end.curvature, smallest=smallest, direction=end.p)
