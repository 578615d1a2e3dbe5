"""A solve that is spread over the estimates of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.solvers.base import Solver, check_positive
from hypergrad.solvers.system import Solution, System


@final
@dataclass(frozen=True)
class Amortised(Solver):
    r"""One gradient step on ½ xᵀAx − vᵀx with each estimate (Dagréou et al. 2022, SOBA, eq. 5).

        x ← x + η (v − A x)

    An estimate uses x as the last one left it, so that the product that moves x is the one that gives the
    hypergradient: implicit hypergradients online at the price of greedy ones. The first one, with x = 0,
    has no response at all, and the residual in the report shows how far x has come; it converges for η <
    2/‖A‖, to the solution where θ and λ rest, and after them where they are updated slowly.

    Args:
        step_size: η.

    Raises:
        ArgumentError: if it is not positive.
    """

    step_size: float

    def __post_init__(self) -> None:
        check_positive("Amortised", "step_size", self.step_size)

    @property
    def differentiable(self) -> bool:
        return False

    def init(self, backend: Backend, v: Tree) -> Tree:
        return backend.zeros(v)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        backend = system.backend
        x = self.init(backend, system.v) if memory is None else memory
        image = system.image(x)
        r = backend.detach(vectors.subtract(backend, system.v, image.ax))
        return Solution(x, 0, 0, memory=backend.axpy(self.step_size, r, x), image=image)
