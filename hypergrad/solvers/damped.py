"""Damping of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from hypergrad.backend import Tree
from hypergrad.solvers.base import Solver, check_size
from hypergrad.solvers.system import Solution, System
from hypergrad.solvers.wrapper import Wrapper


@final
@dataclass(frozen=True)
class Damped(Wrapper):
    r"""Solve (A + δI) x = v in place of A x = v.

    Well-posed for any δ above the most negative curvature, and biased towards x = v/δ. The report gives δ as
    the solve's shift, and its residual is that of the damped system.

    Args:
        solver: solves the damped system.
        damping: δ ≥ 0.

    Raises:
        ArgumentError: if δ is not a number ≥ 0.
    """

    rank: ClassVar[int] = 1

    solver: Solver
    damping: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("Damped", "damping", self.damping)

    def prepared(self, system: System, memory: Tree | None) -> System:
        system = system.shifted(self.damping)
        return replace(self.solver.prepared(system, memory), shift=self.damping)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = self.ready(system, memory)
        return self.finished(system, self.solver.solve(system, memory))

    def finished(self, system: System, solution: Solution) -> Solution:
        return solution._replace(shift=self.damping)
