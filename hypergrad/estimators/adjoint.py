r"""The adjoint x of the implicit function theorem, (∂_θ G)ᵀ x = ∂_θ C2, and how it is found.

It is the Lagrange multiplier of the condition G(θ, λ) = 0, and all that a hypergradient needs to know of how
training responds: dC2/dλ = ∂_λ C2 − (∂_λ G)ᵀ x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypergrad.backend import Backend, Tree
from hypergrad.problems import Problem, Validation
from hypergrad.problems.condition import Condition
from hypergrad.solvers import Image, Solution, Solver, System
from hypergrad.solvers.solve import solved


def solve_adjoint(
    backend: Backend,
    problem: Problem,
    condition: Condition,
    validation: Validation,
    solver: Solver,
    memory: Tree | None = None,
    resampled: Callable[[Tree, Any], Tree] | None = None,
) -> tuple[Solution, Image]:
    """Find x, and with the pull-back that measures its residual also (∂_λ G)ᵀ x.

    Args:
        backend: of the arrays.
        problem: says whether ∂_θ G is symmetric, and definite at a solution.
        condition: G at θ, and products with its derivatives.
        validation: C2 at θ, and its derivatives.
        solver: how x is found.
        memory: the solver's, from its last solution.
        resampled: (p, k) -> (∂_θ G)ᵀ p of another batch, if there are others.
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
    return solved(solver, system, known_memory(backend, solver, validation.v, memory))


def known_memory(backend: Backend, solver: Solver, v: Tree, memory: Tree | None) -> Tree | None:
    """The memory of this solver: as given, or a fresh one where that is of something else."""
    fresh = solver.init(backend, v)
    if fresh is None:
        return None
    same = memory is not None and backend.paths(memory, "") == backend.paths(fresh, "")
    return memory if same else fresh
