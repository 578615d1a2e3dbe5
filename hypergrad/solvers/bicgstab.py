"""Stabilised biconjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Scalar, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers.base import Krylov, rounding
from hypergrad.solvers.minres import MINRES
from hypergrad.solvers.numbers import on_numpy_scalars
from hypergrad.solvers.system import Solution, System


class _Iterate(NamedTuple):
    x: Tree
    r: Tree
    p: Tree
    ap: Tree
    rho: Scalar
    alpha: Scalar
    omega: Scalar
    size: Scalar
    k: Any
    failure: Any
    curvature: Scalar


@final
@dataclass(frozen=True)
class BiCGStab(Krylov):
    r"""Stabilised biconjugate gradients, for any A (van der Vorst 1992).

        p ← r + β (p − ω Ap),   s = r − α Ap,   x ← x + α p + ω s,   r ← s − ω As,   ω = (As)ᵀs / ‖As‖²

    Two products per iteration, and seven vectors for any number of iterations. Use it for systems that are
    not symmetric and too large for the basis of `GMRES`. Its residual may jump, and it may fail with
    ``breakdown``.

    Args:
        max_steps, rtol, atol: see `Krylov`.
    """

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = system.begun()
        solution = self._solve(system)
        return solution._replace(products=solution.products + system.spent)

    def diagnosed(self, system: System, failure: Any) -> Any:
        """Return ``SINGULAR`` where `MINRES` finds a symmetric A singular, or else the failure.

        BiCGStab cannot tell a singular system from a breakdown. Cost: another solve, where one has failed.
        """
        if not system.symmetric:
            return failure
        backend, unnamed = system.backend, (failure != Failure.NONE) & (failure != Failure.SINGULAR)
        found = backend.cond(
            unnamed,
            lambda: MINRES(self.max_steps, self.rtol, self.atol).solve(system).failure + 0 * failure,
            lambda: failure,
        )
        return backend.xp.where(found == Failure.SINGULAR, int(Failure.SINGULAR), failure)

    @on_numpy_scalars
    def _solve(self, system: System) -> Solution:
        backend, product, limit = system.backend, system.product, self.limit(system)
        xp, axpy, inner = backend.xp, backend.axpy, backend.inner
        target = self.target(system)
        size, shadow = vectors.norm(backend, system.r), system.r
        shadow_norm, one, zero = size, xp.ones_like(size), 0.0 * size
        eps = rounding(backend, target)

        def ratio(a: Scalar, b: Scalar) -> Scalar:
            return xp.where(b == 0, zero, a / xp.where(b == 0, one, b))

        def going(it: _Iterate) -> Any:
            return (it.k + 2 <= limit) & (it.size > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            rho = inner(shadow, it.r)
            beta = ratio(rho, it.rho) * ratio(it.alpha, it.omega)
            p = axpy(beta, axpy(-it.omega, it.ap, it.p), it.r)
            ap = product(p)
            ap_norm, shadow_ap = vectors.norm(backend, ap), inner(shadow, ap)
            alpha = ratio(rho, shadow_ap)
            s = axpy(-alpha, ap, it.r)
            t = product(s)
            omega = ratio(inner(t, s), inner(t, t))
            x, r = axpy(omega, s, axpy(alpha, p, it.x)), axpy(-omega, t, s)
            new = vectors.norm(backend, r)
            limits = eps * shadow_norm * it.size, eps * shadow_norm * ap_norm
            negligible = (xp.abs(rho) <= limits[0]) | (xp.abs(shadow_ap) <= limits[1])
            broken = ~xp.isfinite(new) | ((negligible | (omega == 0)) & ~(new <= target))
            # After a breakdown, keep the last iterate.
            x, r, new = backend.map(
                lambda after, before: xp.where(broken, before, after), (x, r, new), (it.x, it.r, it.size)
            )
            largest = xp.maximum(it.curvature, ratio(ap_norm, vectors.norm(backend, p)))
            failure = xp.where(broken, int(Failure.BREAKDOWN), int(Failure.NONE))
            return _Iterate(x, r, p, ap, rho, alpha, omega, new, it.k + 2, failure, largest)

        zeros = backend.zeros(system.v)
        start = _Iterate(
            system.x,
            system.r,
            zeros,
            zeros,
            one,
            one,
            one,
            size,
            0,
            int(Failure.NONE),
            zero + system.curvature,
        )
        end = self.iterate(system, going, body, start, max(1, limit // 2))
        failure = self.final_failure(system, end.failure, end.size > target)
        return Solution(end.x, end.k // 2, end.k, failure, end.curvature)
