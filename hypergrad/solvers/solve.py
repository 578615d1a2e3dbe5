"""One linear solve, judged by its true residual."""

from __future__ import annotations

from typing import Any

from hypergrad.backend import Backend, Tree, find_backend, vectors
from hypergrad.backend.arguments import check_same, check_variables
from hypergrad.errors import ArgumentError, Failure, SolveError, explain
from hypergrad.solvers.base import Solution, Solver, System, relative, rounding


def solve(
    matvec: Any,
    v: Tree,
    solver: Solver,
    *,
    start: Tree | None = None,
    symmetric: bool = True,
    definite: bool = True,
    backend: Backend | str | None = None,
) -> Solution:
    """Solve A x = v on trees of arrays.

    One product more than the solver's own measures the true residual ‖Ax − v‖/‖v‖, by which it is judged.

    Args:
        matvec: p -> A p.
        v: a tree of arrays.
        solver: how.
        start: an x to begin with, at the price of a product.
        symmetric: is A?
        definite: is it to be so, if it is symmetric? `Direct` then calls a negative eigenvalue a failure.
        backend: found from the arrays if it is not given.

    Raises:
        ArgumentError: for a solver that needs symmetry, if there is none; for empty or different trees.
        SolveError: if the solve failed and values can be read; else ``failure`` says so.
    """
    found = find_backend(v, backend=backend)
    check_variables(found, v=v)
    check_symmetry(solver, symmetric)

    def product(p: Tree, k: Any) -> Tree:
        return matvec(p)

    if start is None:
        system = System.at_rest(found, product, v, symmetric, definite)
    else:
        check_same(found, "solve", start, "start", v)
        system = System.begun(found, product, v, start, symmetric, definite)
    solution = solver.solve(found, system)
    r = vectors.subtract(found, v, matvec(solution.x))
    solution = judged(found, solver, system, solution, r)
    if found.readable(solution.residual) and int(solution.failure) != Failure.NONE:
        failure = Failure(int(solution.failure))
        steps, residual = int(solution.iterations), float(solution.residual)
        message = explain(
            f"{type(solver).__name__} failed ({failure.name.lower()}) after {steps} steps, at relative "
            f"residual {residual:.1e}",
            "The solution would carry an error of that order, or mean nothing.",
            _causes(failure, float(solution.curvature)),
        )
        raise SolveError(message, failure, steps, residual)
    return solution


def _causes(failure: Failure, curvature: float) -> tuple[str, ...]:
    conditioned = "A is ill-conditioned: take a preconditioner, or solve (A + δI) x = v"
    definite = f"A is not positive definite: take hg.MINRES, or A + δI (‖A‖ ≥ {curvature:.1e})"
    match failure:
        case Failure.SINGULAR:
            return ("A x = v has no solution, or one that rounding hides: solve (A + δI) x = v",)
        case Failure.NEGATIVE_CURVATURE:
            return (definite,)
        case Failure.DIVERGED:
            step = f"the step is too large: step_size < {2 / curvature:.1e} is stable here"
            return (step, definite)
        case Failure.BREAKDOWN:
            return ("take hg.GMRES, which does not", conditioned)
        case _:
            return ("too few steps: raise max_steps, or rtol", conditioned)


def check_symmetry(solver: Solver, symmetric: bool) -> None:
    """Refuse a solver that needs a symmetric system, for one that is not.

    Raises:
        ArgumentError: naming those that do not.
    """
    if solver.needs_symmetry and not symmetric:
        raise ArgumentError(
            f"{type(solver).__name__} solves symmetric systems, and this one is not (that of a fixed point "
            "is I − ∂Φ): take hg.GMRES, hg.BiCGStab, hg.Neumann or hg.Direct"
        )


def judged(backend: Backend, solver: Solver, system: System, solution: Solution, r: Tree) -> Solution:
    """The solution with its true residual r = v − Ax, by which alone it is believed."""
    xp, residual = backend.xp, relative(backend, r, system.v)
    solution = solution._replace(residual=residual)
    if solver.promises_nothing and system.goal is None:
        return solution
    size, failure = vectors.norm(backend, r), solution.failure
    missed = (failure == Failure.NONE) & ~(size <= solver.target(backend, system))
    failure = xp.where(missed, int(Failure.MAX_STEPS), failure)
    if system.symmetric and (backend.compiles or backend.readable(size)):
        # A residual that H takes to nothing is one that no x can remove.
        lost = rounding(backend, size) ** 0.65 * solution.curvature
        short = failure == Failure.MAX_STEPS
        null = backend.cond(
            short, lambda: vectors.norm(backend, system.product(r, 0)) <= lost * size, lambda: size < 0
        )
        failure = xp.where(short & null, int(Failure.SINGULAR), failure)
    return solution._replace(failure=failure)


def spoiled(backend: Backend, solution: Solution) -> Solution:
    """The solution, or NaN where it failed: for where nobody can be told."""
    bad = solution.failure != Failure.NONE
    nan = backend.xp.where(bad, float("nan"), 0.0 * solution.residual)
    return solution._replace(x=backend.axpy(nan, backend.map(backend.xp.ones_like, solution.x), solution.x))
