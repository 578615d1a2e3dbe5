r"""How wrong is a hypergradient by the implicit function theorem?

With G(θ, λ) = 0 solved up to ‖G‖ and (∂_θ G)ᵀ x = ∂_θ C2 up to r, the error is of first order in both
(Pedregosa 2016, theorem 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad import vectors
from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import Failure
from hypergrad.solvers import Solution, Solver, System
from hypergrad.solvers.base import rounding

Respond = Callable[[Tree], tuple[Tree, Tree]]
"""x -> (A x, (∂_λ G)ᵀ x)."""

_BLOCK = 0.1
_BLOCKS = 40


class _Part(NamedTuple):
    x: Tree
    r: Tree
    size: Scalar
    mixed: Tree
    change: Scalar
    error: Scalar
    k: Any
    iterations: Any
    products: Any
    failure: Any
    curvature: Scalar
    direction: Tree


def until_accurate(
    backend: Backend, solver: Solver, system: System, respond: Respond, direct: Tree, tolerance: float
) -> tuple[Solution, Scalar]:
    r"""Solve until the hypergradient's own error is small, whatever the residual's.

    The residual is taken down by tenths. After each, the hypergradient ĝ_j = ∂_λ C2 − (∂_λ G)ᵀ x_j is
    compared with the one before, d_j = ‖ĝ_j − ĝ_{j−1}‖. If what is left to come shrinks by ρ each time,

        ‖ĝ_j − ĝ‖ ≲ max(1, ρ/(1 − ρ)) d_j,    ρ = max(‖r_j‖/‖r_{j−1}‖, d_j/d_{j−1})

    where the 1 keeps a lucky step from being believed.

    The true residual comes with each comparison, so the solver goes on from the truth. Returns the
    solution, and that error relative to ‖ĝ_j‖.
    """
    xp = backend.xp
    solver, prepared = solver.prepared(backend, system)
    scale = vectors.norm(backend, system.v)
    floor = 10 * rounding(backend, scale) * scale

    def going(it: _Part) -> Any:
        wrong = it.error > tolerance * vectors.norm(backend, vectors.subtract(backend, direct, it.mixed))
        return wrong & (it.k < _BLOCKS) & (it.failure == Failure.NONE) & (it.size > floor)

    def body(it: _Part) -> _Part:
        goal = xp.maximum(_BLOCK * it.size, floor)
        found = solver.solve(backend, system._replace(x=it.x, r=it.r, goal=goal, direction=it.direction))
        ax, mixed = respond(found.x)
        r = vectors.subtract(backend, system.v, ax)
        size = vectors.norm(backend, r)
        change = vectors.norm(backend, vectors.subtract(backend, mixed, it.mixed))
        some = xp.where(it.size > 0, it.size, xp.ones_like(it.size))
        slower = change / xp.where(it.change > 0, it.change, xp.ones_like(change))
        rho = xp.maximum(size / some, xp.where(it.k > 0, slower, 0.0 * slower))
        rho = xp.minimum(rho, 0.9 + 0.0 * rho)
        # A solve that used up its steps and still came nearer goes on.
        tired = (found.failure == Failure.MAX_STEPS) & (size < 0.5 * it.size)
        failure = xp.where(tired, int(Failure.NONE), found.failure)
        return _Part(
            found.x,
            r,
            size,
            mixed,
            change,
            xp.maximum(rho / (1 - rho), 1.0 + 0.0 * rho) * change,
            it.k + 1,
            it.iterations + found.iterations,
            it.products + found.products + 1,
            failure,
            xp.where(xp.isfinite(found.curvature), found.curvature, it.curvature),
            it.direction if isinstance(found.direction, tuple) and not found.direction else found.direction,
        )

    size = vectors.norm(backend, system.r)
    nothing, first = 0.0 * size, respond(system.x)[1]
    start = _Part(
        system.x,
        system.r,
        size,
        first,
        nothing,
        float("inf") + nothing,
        0,
        0,
        1 + prepared,
        int(Failure.NONE),
        nothing,
        backend.zeros(system.v),
    )
    end = backend.while_loop(going, body, start, _BLOCKS)
    whole = vectors.norm(backend, vectors.subtract(backend, direct, end.mixed))
    reached = (end.error <= tolerance * whole) | (end.size <= floor)
    failure = xp.where(reached, int(Failure.NONE), end.failure)
    failure = xp.where(~reached & (failure == Failure.NONE), int(Failure.MAX_STEPS), failure)
    error = xp.where(end.size <= floor, xp.where(end.k > 0, end.error, nothing), end.error)
    some = xp.where(whole > 0, whole, xp.ones_like(whole))
    return Solution(end.x, end.iterations, end.products, failure, end.curvature), error / some


class Sensitivity(NamedTuple):
    """A hypergradient taken apart, for one x: D = ∂_λ C2 − (∂_λ G)ᵀ x, and r = ∂_θ C2 − (∂_θ G)ᵀ x."""

    term: Tree
    r: Tree


def bound(
    backend: Backend,
    here: Sensitivity,
    there: Sensitivity,
    distance: Scalar,
    slope: Scalar,
    coupling: Scalar,
    smallest: Scalar,
) -> Scalar:
    r"""The error bound of Pedregosa 2016, theorem 1, with constants measured on the spot:

        ‖ĝ − dC2/dλ‖ ≤ M/μ ‖r‖ + (L_D + M/μ L_r) ‖G‖/μ

    ``coupling`` is M ≈ ‖∂_λ G‖, ``smallest`` μ, the smallest curvature met, ``slope`` ‖G‖, and L_D, L_r are
    the changes of both parts of the estimate from here to a point ``there``, by the ``distance``.
    Where G is smooth and these are the largest constants around it is a bound; as they are seen in one
    direction each, it is an estimate of one.
    """
    change = [
        vectors.norm(backend, vectors.subtract(backend, a, b)) / distance
        for a, b in zip(there, here, strict=True)
    ]
    gain = coupling / smallest
    return gain * vectors.norm(backend, here.r) + (change[0] + gain * change[1]) * slope / smallest
