"""Generalised minimal residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad import vectors
from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import Failure
from hypergrad.solvers.base import Solution, Solver, System, check_steps, check_tolerance, rounding


class _Cycle(NamedTuple):
    """Arnoldi's basis Q, the Hessenberg matrix H̄ with A Q_j = Q_{j+1} H̄_j, and the best y so far."""

    basis: Any
    hessenberg: Any
    y: Any
    size: Scalar
    j: Any
    closed: Any


class _Iterate(NamedTuple):
    x: Tree
    r: Tree
    size: Scalar
    k: Any
    failure: Any
    curvature: Scalar


@final
@dataclass(frozen=True)
class GMRES(Solver):
    r"""Generalised minimal residuals, for any A (Saad and Schultz 1986).

        x = x_0 + Q_j y,    y = argmin ‖ ‖r_0‖ e_1 − H̄_j y ‖,    A Q_j = Q_{j+1} H̄_j by Arnoldi

    The residual never grows, at the price of a basis of ``restart + 1`` vectors, from which the method begins
    again when it is full. It is for systems that are not symmetric, as those of fixed points are; for
    symmetric ones `CG` and `MINRES` do the same with three vectors. A basis that closes with a residual left
    shows that A is ``singular``.

    Args:
        max_steps: products at most.
        rtol: the relative residual ‖Ax − v‖/‖v‖ to reach,
        atol: or the residual itself.
        restart: the most directions that are kept.
    """

    max_steps: int = 100
    rtol: float = 1e-6
    atol: float = 0.0
    restart: int = 30

    def __post_init__(self) -> None:
        check_steps("GMRES", self.max_steps)
        check_steps("GMRES", self.restart, "restart")
        check_tolerance("GMRES", self.rtol, self.atol)

    def solve(self, backend: Backend, system: System) -> Solution:
        xp, target = backend.xp, self.target(backend, system)
        size, places = vectors.norm(backend, system.r), min(self.restart, self.max_steps)
        eye = backend.asarray(np.eye(places + 1), like=size)
        first, embed = eye[0], eye[:, :places]

        def going(it: _Iterate) -> Any:
            return (it.k < self.max_steps) & (it.size > target) & (it.failure == Failure.NONE)

        def body(it: _Iterate) -> _Iterate:
            cycle = self._cycle(backend, system, it, target, eye)
            steps, left = embed @ cycle.y, it.size * first - cycle.hessenberg @ cycle.y

            def add(carry: tuple[Tree, Tree], i: Any, q: Tree) -> tuple[tuple[Tree, Tree], None]:
                x, r = carry
                return (backend.axpy(steps[i], q, x), backend.axpy(left[i], q, r)), None

            begin = it.x, backend.zeros(it.r)
            (x, r), _ = backend.scan(add, begin, places + 1, xs=cycle.basis)
            stuck = cycle.closed & ~(cycle.size <= target)
            failure = xp.where(stuck, int(Failure.SINGULAR), int(Failure.NONE))
            largest = xp.max(xp.linalg.svd(cycle.hessenberg, full_matrices=False)[1])
            return _Iterate(x, r, cycle.size, it.k + cycle.j, failure, xp.maximum(it.curvature, largest))

        start = _Iterate(system.x, system.r, size, 0, int(Failure.NONE), 0.0 * size)
        end = backend.while_loop(going, body, start, self.max_steps)
        failure = xp.where(
            (end.failure == Failure.NONE) & (end.size > target), int(Failure.MAX_STEPS), end.failure
        )
        return Solution(end.x, end.k, end.k, failure, end.curvature)

    def _cycle(self, backend: Backend, system: System, it: _Iterate, target: Scalar, eye: Any) -> _Cycle:
        """Arnoldi's process from the residual, until it is small or the basis full."""
        xp, count, eps = backend.xp, eye.shape[0], 10 * rounding(backend, target)
        places, one = count - 1, xp.ones_like(it.size)

        def going(cycle: _Cycle) -> Any:
            room = (cycle.j < places) & (it.k + cycle.j < self.max_steps)
            return room & (cycle.size > target) & ~cycle.closed

        def body(cycle: _Cycle) -> _Cycle:
            w = system.product(backend.take(cycle.basis, cycle.j), it.k + cycle.j)
            stretch = vectors.norm(backend, w)

            # Modified Gram-Schmidt; the rows that are still zero take nothing away.
            def project(w: Tree, i: Any, q: Tree) -> tuple[Tree, Scalar]:
                h = backend.inner(q, w)
                return backend.axpy(-h, q, w), h

            w, column = backend.scan(project, w, count, xs=cycle.basis)
            beta = vectors.norm(backend, w)
            closed = ~(beta > eps * stretch)
            beta = xp.where(closed, 0.0 * beta, beta)
            q = vectors.scale(backend, xp.where(closed, 0.0 * one, one) / xp.where(closed, one, beta), w)
            column = backend.dense(column) + beta * eye[cycle.j + 1]
            hessenberg = cycle.hessenberg + xp.reshape(column, (count, 1)) * eye[cycle.j][:places]
            y = _least_squares(backend, hessenberg, it.size)
            left = it.size * eye[0] - hessenberg @ y
            size, basis = xp.sqrt(xp.sum(left * left)), backend.put(cycle.basis, cycle.j + 1, q)
            return _Cycle(basis, hessenberg, y, size, cycle.j + 1, closed)

        unit = vectors.scale(backend, one / xp.where(it.size > 0, it.size, one), it.r)
        basis = backend.stack([unit] + [backend.zeros(it.r)] * places)
        nothing = 0.0 * eye[:, :places]
        start = _Cycle(basis, nothing, nothing[0], it.size, 0, it.size < 0)
        made: _Cycle = backend.while_loop(going, body, start, places)
        return made


def _least_squares(backend: Backend, hessenberg: Any, size: Scalar) -> Any:
    """Solve argmin_y ‖size e_1 − H̄ y‖; columns that are not there yet get zeros."""
    xp = backend.xp
    u, s, vt = xp.linalg.svd(hessenberg, full_matrices=False)
    lost = s <= 10 * rounding(backend, size) * xp.max(s)
    inverse = xp.where(lost, 0.0 * s, 1.0 / xp.where(lost, xp.ones_like(s), s))
    return vt.T @ (inverse * (size * u[0]))
