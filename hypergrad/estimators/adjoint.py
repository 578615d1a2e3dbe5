r"""Solve for the adjoint x of the implicit function theorem, (∂_θ G)ᵀ x = ∂_θ C2.

It is the Lagrange multiplier of the condition G(θ, λ) = 0, and gives the response term of the hypergradient:
dC2/dλ = ∂_λ C2 − (∂_λ G)ᵀ x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypergrad.backend import Backend, Tree
from hypergrad.problems import Problem, Validation
from hypergrad.problems.condition import Condition
from hypergrad.solvers import Image, Solution, Solver, System
from hypergrad.solvers.solve import solve_system


def solve_adjoint(
    backend: Backend,
    problem: Problem,
    condition: Condition,
    validation: Validation,
    solver: Solver,
    memory: Tree | None = None,
    resampled: Callable[[Tree, Any], Tree] | None = None,
) -> tuple[Solution, Image]:
    """Solve for x; the pull-back that measures its residual also gives (∂_λ G)ᵀ x.

    Args:
        backend: the backend of the arrays.
        problem: tells whether ∂_θ G is symmetric, and definite at a solution.
        condition: G at θ, and products with its derivatives.
        validation: C2 at θ, and its derivatives.
        solver: solves for x.
        memory: the solver's memory, from its last solution.
        resampled: (p, k) -> (∂_θ G)ᵀ p on the k-th batch, for a solver that resamples.
    """
    system = System(
        backend,
        condition.product,
        validation.v,
        problem.symmetric,
        problem.definite,
        both=condition.both,
        direct=validation.direct,
        resampled=resampled,
    )
    return solve_system(solver, system, _valid_memory(backend, solver, validation.v, memory))


def _valid_memory(backend: Backend, solver: Solver, v: Tree, memory: Tree | None) -> Tree | None:
    """Return the memory if it has the structure of this solver's memory; otherwise a fresh one."""
    fresh = solver.init(backend, v)
    if fresh is None:
        return None
    same = memory is not None and backend.paths(memory, "") == backend.paths(fresh, "")
    return memory if same else fresh
