"""One solve spread over the estimates of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.solvers.base import Solver, check_positive
from hypergrad.solvers.system import Solution, System


@final
@dataclass(frozen=True)
class Amortised(Solver):
    r"""Take one gradient step on ½ xᵀAx − vᵀx per estimate (Dagréou et al. 2022, SOBA, eq. 5).

        x ← x + η (v − A x)

    An estimate uses the x that the last one left, so that one product both gives the hypergradient and
    updates x: online implicit hypergradients at the cost of greedy ones. The first estimate, with x = 0, has
    no response term. The residual in the report shows how accurate x is. For η < 2/‖A‖, x converges to the
    solution if θ and λ are fixed, and tracks it if they are updated slowly.

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
        x = self.init(backend, system.v) if memory is None else system.scaled(memory)
        image = system.image(x)
        r = backend.detach(vectors.subtract(backend, system.v, image.ax))
        after = system.restored(backend.axpy(self.step_size, r, x))
        return Solution(x, 0, 0, memory=after, image=image)
