"""Solvers that wrap another solver."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import ArgumentError
from hypergrad.solvers.base import Solver
from hypergrad.solvers.system import Solution, System


class Wrapper(Solver):
    """A solver that wraps another one. Each wrapper may be used once, in this order from the outside:

        Warm ∘ UntilAccurate ∘ (Damped or LevenbergMarquardt) ∘ solver

    Raises:
        ArgumentError: for another order, or for a solver that the wrapper does not support.
    """

    rank: ClassVar[int]
    """A wrapper can wrap those of a lower rank."""

    solver: Solver

    def __post_init__(self) -> None:
        name, inner = type(self).__name__, self.solver
        if not isinstance(inner, Solver):
            raise ArgumentError(f"{name}: solver = {inner!r}; it must be a solver such as hg.CG()")
        if isinstance(inner, Wrapper) and inner.rank >= self.rank:
            raise ArgumentError(
                f"{name} cannot wrap {type(inner).__name__}: the order is Warm(UntilAccurate(Damped("
                "solver))), with Damped or LevenbergMarquardt, each at most once"
            )

    @property
    def needs_symmetry(self) -> bool:
        return self.solver.needs_symmetry

    @property
    def promises_nothing(self) -> bool:
        return self.solver.promises_nothing

    @property
    def truncates(self) -> bool:
        return self.solver.truncates

    @property
    def differentiable(self) -> bool:
        return self.solver.differentiable

    @property
    def resamples(self) -> bool:
        return self.solver.resamples

    @property
    def core(self) -> Solver:
        return self.solver.core

    def init(self, backend: Backend, v: Tree) -> Tree | None:
        return self.solver.init(backend, v)

    def prepared(self, system: System, memory: Tree | None) -> System:
        return self.solver.prepared(system, memory)

    def for_one_system(self, system: System) -> tuple[Solver, Any]:
        solver, products = self.solver.for_one_system(system)
        return replace(self, solver=solver), products  # type: ignore[type-var]

    def finished(self, system: System, solution: Solution) -> Solution:
        return self.solver.finished(system, solution)

    def target(self, system: System) -> Scalar:
        return self.solver.target(system)

    def ready(self, system: System, memory: Tree | None) -> System:
        """Return the system, prepared if it is not yet."""
        return system if system.shift is not None else self.prepared(system, memory)
