"""Check solutions by their true residuals."""

from __future__ import annotations

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers.base import Solver, relative_norm, rounding
from hypergrad.solvers.system import Solution, System


def with_true_residual(solver: Solver, system: System, solution: Solution, r: Tree) -> Solution:
    """Return the solution with its true residual, r = v − Ax, and the failure that r shows.

    A solve that reports success but missed its target failed with ``STAGNATION``: rounding parted its own
    residual from the true one. A solver without a residual of its own failed with ``MAX_STEPS``. If A is
    symmetric and maps the remaining residual to zero, no x can remove it, and A is ``SINGULAR``.
    """
    backend = system.backend
    xp, residual = backend.xp, relative_norm(backend, r, system.v)
    solution = solution._replace(residual=residual)
    if solver.promises_nothing and system.goal is None:
        return solution
    size, failure = vectors.norm(backend, r), solution.failure
    missed = (failure == Failure.NONE) & ~(size <= solver.target(system))
    reason = Failure.STAGNATION if solver.core.has_residual else Failure.MAX_STEPS
    failure = xp.where(missed, int(reason), failure)
    if not (backend.compiles or backend.readable(size)):
        return solution._replace(failure=failure)
    if system.symmetric:
        negligible = rounding(backend, size) ** 0.65 * solution.curvature
        unsolved = (Failure.MAX_STEPS, Failure.STAGNATION, Failure.BREAKDOWN)
        short = sum(xp.where(failure == int(reason), 1, 0) for reason in unsolved) > 0
        singular = backend.cond(
            short, lambda: vectors.norm(backend, system.product(r)) <= negligible * size, lambda: size < 0
        )
        failure = xp.where(short & singular, int(Failure.SINGULAR), failure)
    return solution._replace(failure=solver.core.diagnosed(system, failure))


def nan_where_failed(backend: Backend, solution: Solution) -> Solution:
    """Return the solution, its x NaN if the solve failed: for derivatives, which have no report."""
    bad = solution.failure != Failure.NONE
    nan = backend.xp.where(bad, float("nan"), 0.0 * solution.residual)
    return solution._replace(x=backend.axpy(nan, backend.map(backend.xp.ones_like, solution.x), solution.x))
