r"""How wrong is a hypergradient by the implicit function theorem?

With G(θ, λ) = 0 solved up to ‖G‖ and (∂_θ G)ᵀ x = ∂_θ C2 up to r, the error is of first order in both
(Pedregosa 2016, theorem 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import ArgumentError, Failure
from hypergrad.problems.base import Validation
from hypergrad.second_order.condition import Stationary
from hypergrad.solvers import Solution, Solver, System
from hypergrad.solvers.base import met, rounding

Respond = Callable[[Tree], tuple[Tree, Tree]]
"""x -> (A x, (∂_λ G)ᵀ x)."""

_BLOCK = 0.1
_BLOCKS = 40
_PROBES = 4


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
    smallest: Scalar
    direction: Tree


def until_accurate(
    backend: Backend, solver: Solver, system: System, respond: Respond, direct: Tree, tolerance: float
) -> tuple[Solution, Scalar]:
    r"""Solve until the hypergradient's own error is small, whatever the residual's.

    The residual is taken down by tenths. After each, the hypergradient ĝ_j = ∂_λ C2 − (∂_λ G)ᵀ x_j is
    compared with the one before, d_j = ‖ĝ_j − ĝ_{j−1}‖. If what is left to come shrinks by ρ each time,

        ‖ĝ_j − ĝ‖ ≲ max(1, ρ/(1 − ρ)) max(d_j, d_{j−1}/10),    ρ = max(‖r_j‖/‖r_{j−1}‖, d_j/d_{j−1})

    where the 1 and the change before keep one lucky step from being believed. A direction that ∂_λ G sees and
    that no solve has come to yet can still fool it, as any rule that looks at changes.

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
        found = solver.solve(
            backend, system._replace(x=it.x, r=it.r, goal=goal, direction=it.direction, met=it.curvature)
        )
        ax, mixed = respond(found.x)
        r = vectors.subtract(backend, system.v, ax)
        size = vectors.norm(backend, r)
        change = vectors.norm(backend, vectors.subtract(backend, mixed, it.mixed))
        some = xp.where(it.size > 0, it.size, xp.ones_like(it.size))
        slower = change / xp.where(it.change > 0, it.change, xp.ones_like(change))
        rho = xp.maximum(size / some, xp.where(it.k > 1, slower, 0.0 * slower))
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
            xp.maximum(rho / (1 - rho), 1.0 + 0.0 * rho) * xp.maximum(change, _BLOCK * it.change),
            it.k + 1,
            it.iterations + found.iterations,
            it.products + found.products + 1,
            failure,
            xp.where(found.curvature > it.curvature, found.curvature, it.curvature),
            xp.where(found.smallest < it.smallest, found.smallest, it.smallest),
            it.direction if isinstance(found.direction, tuple) and not found.direction else found.direction,
        )

    size = vectors.norm(backend, system.r)
    nothing, first = 0.0 * size, respond(system.x)[1]
    start = _Part(
        system.x,
        system.r,
        size,
        first,
        float("inf") + nothing,  # nothing has changed yet, and the first change is not believed
        float("inf") + nothing,
        0,
        0,
        1 + prepared,
        int(Failure.NONE),
        nothing + system.met,
        float("inf") + nothing,
        backend.zeros(system.v),
    )
    end = backend.while_loop(going, body, start, _BLOCKS)
    whole = vectors.norm(backend, vectors.subtract(backend, direct, end.mixed))
    reached = (end.error <= tolerance * whole) | (end.size <= floor)
    failure = xp.where(reached, int(Failure.NONE), end.failure)
    failure = xp.where(~reached & (failure == Failure.NONE), int(Failure.MAX_STEPS), failure)
    some = xp.where(whole > 0, whole, xp.ones_like(whole))
    seen = met(backend, end.smallest)
    # Where only rounding is left, that of x is no more than this.
    length = vectors.norm(backend, end.x)
    rounded = end.size / xp.where(length > 0, seen * length, xp.ones_like(length))
    error = xp.where(
        end.size <= floor, xp.where(end.error < float("inf"), end.error, rounded * some), end.error
    )
    solution = Solution(end.x, end.iterations, end.products, failure, end.curvature, smallest=seen)
    return solution, error / some


def bound(
    backend: Backend,
    at: Stationary,
    validation: Validation,
    theta: Tree,
    elsewhere: Callable[[Tree], tuple[Stationary, Validation]],
    solution: Solution,
    damping: Scalar,
) -> Scalar:
    r"""The error bound of Pedregosa 2016, theorem 1, with constants measured on the spot:

        ‖ĝ − dC2/dλ‖ ≤ M/μ ‖r‖ + (L_D + M/μ L_r) ‖G‖/μ

    for D = ∂_λ C2 − (∂_λ G)ᵀ x and r = ∂_θ C2 − (∂_θ G)ᵀ x, which has no damping in it and no curvature but
    G's own. M ≈ ‖∂_λ G‖ is seen in random directions, μ is the smallest curvature met, and L_D, L_r are how
    fast D and r change with θ along −G, which ``elsewhere`` tells. Where G is smooth and these are the
    largest around θ it is a bound; as they are seen in one direction each, it is an estimate of one.

    NaN where the solver met no curvature, as those that are no Krylov methods, or none of more than δ.
    Cost: 2 gradients and 6 products.

    Raises:
        ArgumentError: if nobody knows G.
    """
    if at.residual is None:
        raise ArgumentError("Implicit: bound= needs ‖∇C̃1‖: give Derivatives(inner_grad=…)")
    xp, x = backend.xp, backend.detach(solution.x)

    def norm(tree: Tree) -> Scalar:
        return vectors.norm(backend, backend.detach(tree))

    def parts(at: Stationary, validation: Validation) -> tuple[Tree, Tree, Tree, Tree]:
        hx, mixed, _ = at.both(x)
        term = vectors.subtract(backend, validation.direct, mixed)
        return term, vectors.subtract(backend, validation.v, hx), hx, mixed

    flat, unravel = backend.ravel(theta)
    probes = [
        norm(at.both(unravel(backend.random.normal(0, k, tuple(flat.shape), flat)))[1])
        for k in range(_PROBES)
    ]
    term, r, hx, mixed = parts(at, validation)
    length = norm(x)
    length = xp.where(length > 0, length, xp.ones_like(length))
    stretch, nan = norm(hx) / length, float("nan") * length
    # The solve has met curvatures of H + δI, among which none below δ is seen apart.
    smallest = xp.minimum(solution.smallest - damping, xp.where(stretch > 0, stretch, float("inf") + stretch))
    smallest = xp.where(smallest > damping, smallest, nan)
    coupling = xp.maximum(xp.sqrt(sum(p * p for p in probes) / _PROBES), norm(mixed) / length)

    # As far as a gradient step would go, and far enough to be seen.
    slope = norm(at.residual)
    visible = float(xp.finfo(slope.dtype).eps) ** 0.5 * (1.0 + norm(theta))
    largest = xp.where(solution.curvature > stretch, solution.curvature, stretch)
    distance = xp.maximum(slope / largest, visible)
    some = xp.where(slope > 0, slope, xp.ones_like(slope))
    there = backend.axpy(-distance / some, backend.detach(at.residual), backend.detach(theta))
    changes = [
        norm(vectors.subtract(backend, far, near)) / distance
        for far, near in zip(parts(*elsewhere(there))[:2], (term, r), strict=True)
    ]
    gain = coupling / smallest
    return gain * norm(r) + (changes[0] + gain * changes[1]) * slope / smallest
