"""The message of a failed solve: the failure, its likely causes, and their remedies."""

from __future__ import annotations

from hypergrad.errors import Failure, explain
from hypergrad.solvers.base import Solver
from hypergrad.solvers.direct import Direct


def diagnosis(
    failure: Failure, solver: Solver, iterations: int, residual: float, gradient_norm: float, curvature: float
) -> str:
    """Explain why a solve failed at a point where ‖∇C̃1‖ is ``gradient_norm``."""
    solver = solver.core
    name = type(solver).__name__
    far = (
        f"the parameters are far from the inner optimum (‖∇C̃1‖ = {gradient_norm:.1e}): train longer, or use "
        "Unrolled"
    )
    conditioned = "the Hessian is ill-conditioned: wrap the solver in hg.Damped, or give CG a preconditioner"
    accept = 'the bias is acceptable: checks=hg.Checks(unsolved="warn")'
    bias = "The hypergradient would have an error of that order."
    after, saddle = f" after {iterations} iterations", ["θ is meant to be a saddle: use hg.MINRES", accept]
    if isinstance(solver, Direct):  # it does not iterate, and is exact at a saddle
        after = ""
        saddle = ['θ is meant to be a saddle, where Direct is exact: checks=hg.Checks(unsolved="warn")']
    match failure:
        case Failure.SINGULAR:
            return explain(
                f"the Hessian is singular: {name} found a direction without curvature{after}, at relative "
                f"residual {residual:.1e}",
                "H x = v has no solution, so the hypergradient is not defined.",
                (
                    "C̃1 does not determine all parameters: add a penalty, or wrap the solver in hg.Damped",
                    far,
                    accept,
                ),
            )
        case Failure.NEGATIVE_CURVATURE:
            return explain(
                f"the Hessian is not positive definite: {name} found negative curvature{after}",
                "θ is not a minimum of C̃1, so the implicit function theorem does not apply.",
                (
                    far,
                    f"make H + δI definite (‖H‖ ≈ {curvature:.1e}): wrap the solver in hg.Damped, or in "
                    "hg.LevenbergMarquardt, which finds δ",
                    *saddle,
                ),
            )
        case Failure.DIVERGED:
            return explain(
                f"the series of {name} diverged after {iterations} terms, at relative residual "
                f"{residual:.1e}",
                bias,
                (
                    f"the step is too large: step_size < {2 / curvature:.1e} is stable here",
                    "the Hessian is not positive definite: wrap the solver in hg.Damped, or train longer",
                    accept,
                ),
            )
        case Failure.STAGNATION:
            return explain(
                f"rounding keeps the inverse-Hessian solve at relative residual {residual:.1e} > rtol "
                f"{solver.rtol or solver.atol:.1e}, which {name} reached by its own count after {iterations} "
                "iterations",
                bias,
                ("the arithmetic is too coarse: use float64, or a larger rtol", conditioned, accept),
            )
        case Failure.BREAKDOWN:
            return explain(
                f"{name} broke down after {iterations} iterations, at relative residual {residual:.1e}",
                bias,
                ("use hg.GMRES, which does not break down", conditioned, accept),
            )
        case _:
            return explain(
                f"the inverse-Hessian solve stopped at relative residual {residual:.1e} > rtol "
                f"{solver.rtol or solver.atol:.1e} after {iterations} iterations of {name}",
                bias,
                (
                    far,
                    conditioned,
                    "too few iterations: raise max_steps, or use rtol=None, a truncation without a promise",
                    accept,
                ),
            )
