"""Solves that begin where the last one ended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.solvers.base import Solver
from hypergrad.solvers.system import Solution, System
from hypergrad.solvers.wrapper import Wrapper


class LastSolution(NamedTuple):
    """The x of the last solve, and the memory of the solver that it is made of."""

    x: Tree
    inner: Tree | None


@final
@dataclass(frozen=True)
class Warm(Wrapper):
    r"""Begin each solve with the x of the last one.

    Where θ and λ are updated slowly, the last x is nearly right, and a few products mend it. Costs one
    product to find the residual to begin with. The first solve begins with 0.

    Args:
        solver: how each system is solved.

    Raises:
        ArgumentError: around a solver that begins with its last x anyhow.
    """

    rank: ClassVar[int] = 3

    solver: Solver

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.solver.differentiable or self.solver.resamples):
            raise ArgumentError(f"Warm: {self.solver!r} begins with its last x as it is")

    def init(self, backend: Backend, v: Tree) -> LastSolution:
        return LastSolution(backend.zeros(v), self.solver.init(backend, v))

    def prepared(self, system: System, memory: Tree | None) -> System:
        known: LastSolution = self.init(system.backend, system.v) if memory is None else memory
        return self.solver.prepared(replace(system, x=known.x, r=None), known.inner)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = self.ready(system, memory)
        solution = self.solver.solve(system, None if memory is None else memory.inner)
        return solution._replace(memory=LastSolution(solution.x, solution.memory))
