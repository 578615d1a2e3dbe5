"""Linear solves with derivatives, checked by their true residuals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypergrad.backend import Backend, Tree, find_backend, vectors
from hypergrad.backend.arguments import check_same, check_variables
from hypergrad.errors import ArgumentError, Failure, SolveError, explain
from hypergrad.solvers.base import Solver
from hypergrad.solvers.residual import nan_where_failed, with_true_residual
from hypergrad.solvers.system import Image, Solution, System


def solve_system(
    solver: Solver, system: System, memory: Tree | None = None, through_steps: bool = False
) -> tuple[Solution, Image]:
    """Solve A x = v, and compute A x and B x with one more product, which measures the true residual.

    x has the derivatives of A⁻¹v, each by another solve. Derivatives of a truncating solver go through its
    iterations, and so do those of any solver with ``through_steps``. The image depends on x; all else is
    constant.
    """
    backend, system = system.backend, system.balanced()
    prepared = solver.prepared(system.constant(), memory)
    shifted = replace(
        system.shifted(prepared.shift), x=prepared.x, trials=prepared.trials, spent=prepared.spent
    )

    def solve_from_start(matvec: Any, v: Tree) -> tuple[Tree, Solution]:
        solution = solver.solve(replace(prepared, product=matvec, v=v, r=None), memory)
        return solution.x, _without_trees(solution)

    def solve_derivative(matvec: Any, v: Tree) -> tuple[Tree, Solution]:
        derivative = replace(
            prepared, product=matvec, v=v, x=None, r=None, both=None, trials=None, spent=0, scale=1.0
        ).balanced()
        solution = solver.solve(derivative, memory)
        r = vectors.subtract(backend, derivative.v, matvec(solution.x))
        solution = nan_where_failed(backend, with_true_residual(solver, derivative, solution, r))
        return derivative.restored(solution.x), _without_trees(solution)

    if through_steps or solver.truncates or solver.resamples:
        solution = solver.solve(shifted, memory)
        x = solution.x
    else:
        x, solution = backend.linear_solve(
            shifted.product, system.v, solve_from_start, solve_derivative, system.symmetric
        )
    image = shifted.image(x) if solution.image is None else solution.image
    constant = shifted.constant()
    r = vectors.subtract(backend, constant.v, backend.detach(image.ax))
    solution = solution._replace(x=None, image=None, direction=None)
    solution = with_true_residual(solver, constant, Solution(*backend.detach(tuple(solution))), r)
    restored = system.restored
    mixed = None if image.mixed is None else restored(image.mixed)
    return solution._replace(x=restored(x)), Image(restored(image.ax), mixed, image.error)


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

    One product more than the solver's own measures the true residual ‖Ax − v‖/‖v‖, by which the solve
    succeeds or fails. x has the derivatives of A⁻¹v, each of which takes another solve.

    Args:
        matvec: p -> A p.
        v: a tree of arrays.
        solver: the solver.
        start: the x to start from, at the cost of a product.
        symmetric: is A symmetric?
        definite: should a symmetric A be positive definite? Then `Direct` fails for a negative eigenvalue.
        backend: found from the arrays if it is not given.

    Raises:
        ArgumentError: if the solver needs a symmetric A and it is not; for empty or different trees.
        SolveError: if the solve failed and values can be read. If they cannot, as in a compiled program, x is
            then NaN, and ``failure`` says why.
    """
    backend = find_backend(v, backend=backend)
    check_variables(backend, v=v)
    check_symmetry(solver, symmetric)
    if start is not None:
        check_same(backend, "solve", start, "start", v)
    system = System(backend, matvec, v, symmetric, definite, x=start)
    # Where nothing is traced no derivative is being taken, and solvers of other libraries can read values.
    concrete = backend.compiles and backend.readable(*backend.flatten(matvec(v))[0])
    solution, _ = solve_system(solver, system, through_steps=concrete)
    if backend.readable(solution.residual) and int(solution.failure) != Failure.NONE:
        failure = Failure(int(solution.failure))
        iterations, residual = int(solution.iterations), float(solution.residual)
        message = explain(
            f"{type(solver.core).__name__} failed ({failure.name.lower()}) after {iterations} iterations, at "
            f"relative residual {residual:.1e}",
            "The solution would have an error of that order, or be meaningless.",
            _causes(failure, float(solution.curvature)),
        )
        raise SolveError(message, failure, iterations, residual)
    return solution if backend.readable(solution.residual) else nan_where_failed(backend, solution)


def _causes(failure: Failure, curvature: float) -> tuple[str, ...]:
    conditioned = "A is ill-conditioned: use a preconditioner, or solve (A + δI) x = v"
    definite = f"A is not positive definite: use hg.MINRES, or A + δI (‖A‖ ≥ {curvature:.1e})"
    match failure:
        case Failure.SINGULAR:
            return ("A x = v has no solution, or rounding hides it: solve (A + δI) x = v",)
        case Failure.NEGATIVE_CURVATURE:
            return (definite,)
        case Failure.DIVERGED:
            step = f"the step is too large: step_size < {2 / curvature:.1e} is stable here"
            return (step, definite)
        case Failure.STAGNATION:
            return (
                "rounding keeps the residual above the tolerance: use float64, or a larger rtol",
                conditioned,
            )
        case Failure.BREAKDOWN:
            return ("use hg.GMRES, which does not break down", conditioned)
        case _:
            return ("too few iterations: raise max_steps, or rtol", conditioned)


def check_symmetry(solver: Solver, symmetric: bool) -> None:
    """Check that a solver can solve a system that is not symmetric.

    Raises:
        ArgumentError: if it cannot, naming solvers that can.
    """
    if solver.needs_symmetry and not symmetric:
        raise ArgumentError(
            f"{type(solver.core).__name__} needs a symmetric system, and this one is not (that of a fixed "
            "point is I − ∂Φ): use hg.GMRES, hg.BiCGStab, hg.Neumann or hg.Direct"
        )


def _without_trees(solution: Solution) -> Solution:
    """Return the solution without trees like x, as values that a compiled program can return."""
    failure = solution.failure
    return solution._replace(
        x=None, direction=None, image=None, failure=int(failure) if isinstance(failure, int) else failure
    )
