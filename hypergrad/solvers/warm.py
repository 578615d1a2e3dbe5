"""Solves that start from the last solution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.solvers.base import Solver
from hypergrad.solvers.system import Solution, System
from hypergrad.solvers.wrapper import Wrapper


class LastSolution(NamedTuple):
    """The x of the last solve, and the memory of the wrapped solver."""

    x: Tree
    inner: Tree | None


@final
@dataclass(frozen=True)
class Warm(Wrapper):
    r"""Start each solve from the x of the last one.

    Where θ and λ are updated slowly, the last x is nearly right, and a few products correct it. Costs one
    product for the initial residual. The first solve starts from 0.

    Args:
        solver: solves each system.

    Raises:
        ArgumentError: for a solver that already starts from its last x.
    """

    rank: ClassVar[int] = 3

    solver: Solver

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.solver.differentiable or self.solver.resamples):
            raise ArgumentError(f"Warm: {self.solver!r} already starts from its last x")

    def init(self, backend: Backend, v: Tree) -> LastSolution:
        return LastSolution(backend.zeros(v), self.solver.init(backend, v))

    def prepared(self, system: System, memory: Tree | None) -> System:
        last: LastSolution = self.init(system.backend, system.v) if memory is None else memory
        return self.solver.prepared(replace(system, x=system.scaled(last.x), r=None), last.inner)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = self.ready(system, memory)
        solution = self.solver.solve(system, None if memory is None else memory.inner)
        return solution._replace(memory=LastSolution(system.restored(solution.x), solution.memory))
