"""A solve that is spread over the estimates of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hypergrad.backend import Backend, Tree
from hypergrad.solvers.base import Solution, Solver, System, check_positive


@final
@dataclass(frozen=True)
class Amortised(Solver):
    r"""One gradient step on ½ xᵀHx − vᵀx with each estimate (Dagréou et al. 2022, SOBA, eq. 5).

        x ← x + η (v − H x)

    The estimate takes x as the last one left it, so that the product that moves x is the one that gives the
    hypergradient: implicit hypergradients online at the price of greedy ones. The first, with x = 0, has no
    response at all, and the residual in the report shows how far x has come; it converges for η < 2/‖H‖, to
    the solution where θ and λ rest, and after them where they move slowly.

    Args:
        step_size: η.

    Raises:
        ArgumentError: if it is not positive.
    """

    step_size: float

    def __post_init__(self) -> None:
        check_positive("Amortised", "step_size", self.step_size)

    def solve(self, backend: Backend, system: System) -> Solution:
        return Solution(system.x, 0, 0)

    def remembered(self, backend: Backend, x: Tree, r: Tree) -> Tree:
        return backend.axpy(self.step_size, r, x)
