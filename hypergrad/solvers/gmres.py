"""Generalised minimal residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers.base import Krylov, check_count, nan_if_infinite, rounding
from hypergrad.solvers.system import Solution, System

_FEWEST_KEPT, _MOST_KEPT, _BASIS_BYTES = 30, 256, 2**28


class _Cycle(NamedTuple):
    """Arnoldi's basis Q, the Hessenberg matrix H̄ with A Q_j = Q_{j+1} H̄_j, and ψ with ψᵀH̄ = 0, ψ_0 = 1."""

    basis: Any
    hessenberg: Any
    psi: Any
    size: Scalar
    j: Any
    closed: Any
    curvature: Scalar


class _Iterate(NamedTuple):
    x: Tree
    r: Tree
    size: Scalar
    k: Any
    cycles: Any
    failure: Any
    curvature: Scalar
    smallest: Scalar


@final
@dataclass(frozen=True)
class GMRES(Krylov):
    r"""Generalised minimal residuals, for any A (Saad and Schultz 1986).

        x = x_0 + Q_j y,    y = argmin ‖ ‖r_0‖ e_1 − H̄_j y ‖,    A Q_j = Q_{j+1} H̄_j by Arnoldi

    The residual never grows, at the cost of a basis of ``restart + 1`` vectors; when it is full, the method
    restarts, and may then converge slowly or not at all. Use it for systems that are not symmetric, such as
    those of fixed points; for symmetric ones `CG` and `MINRES` do the same with a few vectors. If the basis
    cannot grow, H̄ is singular and a residual is left, then A is ``singular``.

    Args:
        max_steps, rtol, atol: see `Krylov`.
        restart: the most directions to keep; by default one for each unknown, up to 256, and up to 30 where
            more would take over 256 MiB.
    """

    restart: int | None = None

    def __post_init__(self) -> None:
        Krylov.__post_init__(self)
        check_count("GMRES", "restart", self.restart, optional=True)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = system.begun()
        backend, max_products = system.backend, self.limit(system)
        xp, target = backend.xp, self.target(system)
        size, places = vectors.norm(backend, system.r), min(self._kept(system), max_products)
        limit, eye = -(-max_products // places), backend.asarray(np.eye(places + 1), like=size)

        def going(it: _Iterate) -> Any:
            room = (it.k < max_products) & (it.cycles < limit)
            return room & (it.size > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            cycle = self._cycle(system, it, target, eye, max_products)
            y, values, regular = _least_squares(backend, cycle, it.size, eye)
            steps, left = eye[:, :places] @ y, it.size * eye[0] - cycle.hessenberg @ y

            def add(carry: tuple[Tree, Tree], i: Any, q: Tree) -> tuple[tuple[Tree, Tree], None]:
                x, r = carry
                return (backend.axpy(steps[i], q, x), backend.axpy(left[i], q, r)), None

            begin, full = (it.x, backend.zeros(it.r)), _filled(cycle.j, places) + 1
            (x, r), _ = backend.scan(add, begin, full, xs=cycle.basis)
            # Where H̄ is singular, ψ may have been divided by a rounding error: measure the residual.
            size = xp.where(regular & ~cycle.closed, cycle.size, xp.sqrt(xp.sum(left * left)))
            finished = cycle.closed | (cycle.size <= target)
            stuck = finished & ~regular & ~(size <= target)
            return _Iterate(
                x,
                r,
                size,
                it.k + cycle.j,
                it.cycles + 1,
                xp.where(stuck, int(Failure.SINGULAR), int(Failure.NONE)),
                xp.maximum(it.curvature, xp.max(values)),
                xp.minimum(it.smallest, xp.min(values)),
            )

        zero = 0.0 * size
        start = _Iterate(
            system.x,
            system.r,
            size,
            0,
            0,
            int(Failure.NONE),
            zero + system.curvature,
            zero + float("inf"),
        )
        end = self.iterate(system, going, body, start, limit)
        failure = self.final_failure(system, end.failure, end.size > target)
        products, smallest = end.k + system.spent, nan_if_infinite(backend, end.smallest)
        return Solution(end.x, end.k, products, failure, end.curvature, smallest)

    def _kept(self, system: System) -> int:
        """Return the most directions to keep."""
        if self.restart is not None:
            return self.restart
        backend, v = system.backend, system.v
        fitting = _BASIS_BYTES // max(vectors.nbytes(backend, v), 1)
        return min(vectors.size(backend, v), _MOST_KEPT, max(fitting, _FEWEST_KEPT))

    def _cycle(self, system: System, it: _Iterate, target: Scalar, eye: Any, max_products: int) -> _Cycle:
        """Run Arnoldi's process from the residual until that is small or the basis is full."""
        backend = system.backend
        xp, count, eps = backend.xp, eye.shape[0], 10 * rounding(backend, target)
        places, one = count - 1, xp.ones_like(it.size)

        def going(cycle: _Cycle) -> Any:
            room = (cycle.j < places) & (it.k + cycle.j < max_products)
            return room & (cycle.size > target) & ~cycle.closed

        def body(cycle: _Cycle) -> _Cycle:
            here, after = backend.take(eye, cycle.j), backend.take(eye, cycle.j + 1)
            w = system.product(backend.take(cycle.basis, cycle.j))
            largest = xp.maximum(cycle.curvature, vectors.norm(backend, w))

            # Modified Gram-Schmidt loses orthogonality only as the residual falls, and GMRES with it is
            # backward stable (Paige, Rozložník, Strakoš 2006). Basis vectors that are still 0 have no effect.
            def project(carry: tuple[Tree, Any], i: Any, q: Tree) -> tuple[tuple[Tree, Any], None]:
                w, column = carry
                h = backend.inner(q, w)
                return (backend.axpy(-h, q, w), column + h * eye[i]), None

            full = _filled(cycle.j, places) + 1
            (w, column), _ = backend.scan(project, (w, 0.0 * eye[0]), full, xs=cycle.basis)
            beta = vectors.norm(backend, w)
            closed = ~(beta > eps * largest)
            beta = xp.where(closed, 0.0 * beta, beta)
            inverse = xp.where(closed, 0.0 * one, one) / xp.where(closed, one, beta)
            # The residual Q(‖r‖ e_1 − H̄y) is smallest where the bracket is parallel to ψ, since H̄ᵀψ = 0.
            psi = cycle.psi - inverse * xp.sum(cycle.psi * column) * after
            column = column + beta * after
            return _Cycle(
                backend.set_row(cycle.basis, cycle.j + 1, vectors.scale(backend, inverse, w)),
                cycle.hessenberg + xp.reshape(column, (count, 1)) * here[:places],
                psi,
                it.size / xp.sqrt(xp.sum(psi * psi)),
                cycle.j + 1,
                closed,
                largest,
            )

        unit = vectors.scale(backend, one / xp.where(it.size > 0, it.size, one), it.r)
        basis = backend.stack([unit] + [backend.zeros(it.r)] * places)
        start = _Cycle(basis, 0.0 * eye[:, :places], eye[0], it.size, 0, it.size < 0, it.curvature)
        end: _Cycle = self.iterate(system, going, body, start, places)
        return end


def _filled(j: Any, places: int) -> int:
    """Return the most places that can be filled: j if it is a number, all of them in a compiled program."""
    return j if isinstance(j, int) else places


def _least_squares(backend: Backend, cycle: _Cycle, size: Scalar, eye: Any) -> tuple[Any, Any, Any]:
    """Return y = argmin ‖size e_1 − H̄ y‖, the singular values of H̄, and whether H̄ is regular.

    A missing column of H̄ is replaced by one of the largest column norm in a row of its own. It does not
    affect y, nor the largest and the smallest singular value.
    """
    xp, count, h = backend.xp, eye.shape[0], cycle.hessenberg
    missing = backend.asarray(np.arange(count - 1), like=size) >= cycle.j
    zeros = 0.0 * eye[0, 1:]
    padded = h + eye[:, 1:] * xp.where(missing, zeros + xp.sqrt(xp.max(xp.sum(h * h, axis=0))), zeros)
    u, s, vt = xp.linalg.svd(padded, full_matrices=False)
    negligible = s <= 10 * count * rounding(backend, size) * xp.maximum(cycle.curvature, xp.max(s))
    inverse = xp.where(negligible, 0.0 * s, 1.0 / xp.where(negligible, xp.ones_like(s), s))
    return vt.T @ (inverse * (size * u[0])), s, ~xp.any(negligible)
