"""The true residual of a solution, by which alone it is believed."""

from __future__ import annotations

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers.base import Solver, relative, rounding
from hypergrad.solvers.system import Solution, System


def judge(solver: Solver, system: System, solution: Solution, r: Tree) -> Solution:
    """The solution with its true residual r = v − Ax, and the failure that this shows.

    A solve that says it succeeded, and did not reach its target, is out of steps; and where A is symmetric
    and takes the residual that is left to nothing, no x can remove it, and A is singular.
    """
    backend = system.backend
    xp, residual = backend.xp, relative(backend, r, system.v)
    solution = solution._replace(residual=residual)
    if solver.promises_nothing and system.goal is None:
        return solution
    size, failure = vectors.norm(backend, r), solution.failure
    missed = (failure == Failure.NONE) & ~(size <= solver.target(system))
    failure = xp.where(missed, int(Failure.MAX_STEPS), failure)
    if system.symmetric and (backend.compiles or backend.readable(size)):
        lost = rounding(backend, size) ** 0.65 * solution.curvature
        short = failure == Failure.MAX_STEPS
        null = backend.cond(
            short, lambda: vectors.norm(backend, system.product(r)) <= lost * size, lambda: size < 0
        )
        failure = xp.where(short & null, int(Failure.SINGULAR), failure)
    return solution._replace(failure=failure)


def nan_where_failed(backend: Backend, solution: Solution) -> Solution:
    """The solution, and NaN in its place where it failed: for derivatives, which have no report."""
    bad = solution.failure != Failure.NONE
    nan = backend.xp.where(bad, float("nan"), 0.0 * solution.residual)
    return solution._replace(x=backend.axpy(nan, backend.map(backend.xp.ones_like, solution.x), solution.x))
