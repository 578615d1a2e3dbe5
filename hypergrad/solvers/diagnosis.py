"""What a failed solve says: the fact, its causes, and their remedies."""

from __future__ import annotations

from hypergrad.errors import Failure, explain
from hypergrad.solvers.base import Solver


def diagnosis(
    failure: Failure, solver: Solver, steps: int, residual: float, away: float, curvature: float
) -> str:
    """Explain why a solve failed at a point where ‖∇C̃1‖ is ``away``."""
    solver = solver.core
    name = type(solver).__name__
    far = f"the parameters are far from the inner optimum (‖∇C̃1‖ = {away:.1e}): train longer, or use Unrolled"
    conditioned = "the Hessian is ill-conditioned: wrap the solver in hg.Damped, or give CG a preconditioner"
    accept = 'accept the bias knowingly: checks=hg.Checks(unsolved="warn")'
    bias = "The hypergradient would carry an error of that order."
    match failure:
        case Failure.SINGULAR:
            return explain(
                f"the Hessian is singular: {name} met a direction without curvature after {steps} steps, "
                f"at relative residual {residual:.1e}",
                "H x = v has no solution, and the hypergradient is not defined by it.",
                ("a parameter is free: give it a penalty, or wrap the solver in hg.Damped", far, accept),
            )
        case Failure.NEGATIVE_CURVATURE:
            return explain(
                f"the Hessian is not positive definite: {name} met negative curvature at step {steps}",
                "θ is no minimum of C̃1, so the implicit function theorem does not hold there.",
                (
                    far,
                    f"make H + δI definite (‖H‖ ≈ {curvature:.1e}): wrap the solver in hg.Damped, or in "
                    "hg.LevenbergMarquardt, which finds δ",
                    "a saddle is meant: take hg.MINRES",
                    accept,
                ),
            )
        case Failure.DIVERGED:
            return explain(
                f"the series of {name} diverged after {steps} terms, at relative residual {residual:.1e}",
                bias,
                (
                    f"the step is too large: step_size < {2 / curvature:.1e} is stable here",
                    "the Hessian is not positive definite: wrap the solver in hg.Damped, or train longer",
                    accept,
                ),
            )
        case Failure.BREAKDOWN:
            return explain(
                f"{name} broke down after {steps} steps, at relative residual {residual:.1e}",
                bias,
                ("take hg.GMRES, which does not", conditioned, accept),
            )
        case _:
            return explain(
                f"the inverse-Hessian solve stopped at relative residual {residual:.1e} > rtol "
                f"{solver.rtol or solver.atol:.1e} after {steps} steps of {name}",
                bias,
                (
                    far,
                    conditioned,
                    "too few steps: raise max_steps, or take rtol=None, a truncation that promises nothing",
                    accept,
                ),
            )
