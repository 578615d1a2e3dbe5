"""Solves that stop when what x is needed for is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Solver, met, rounding
from hypergrad.solvers.system import Solution, System
from hypergrad.solvers.wrapper import Wrapper

_BLOCK = 0.1
_BLOCKS = 40


class _Part(NamedTuple):
    x: Tree
    r: Tree
    size: Scalar
    mixed: Tree
    change: Scalar
    error: Scalar
    k: Any
    iterations: Any
    products: Any
    failure: Any
    curvature: Scalar
    smallest: Scalar
    direction: Tree


@final
@dataclass(frozen=True)
class UntilAccurate(Wrapper):
    r"""Solve until the relative error of the hypergradient is small, whatever the residual's.

    The residual is taken down by tenths. After each, the hypergradient ĝ_j = c − B x_j is compared with the
    one before, d_j = ‖ĝ_j − ĝ_{j−1}‖. If what is left to come shrinks by ρ each time,

        ‖ĝ_j − ĝ‖ ≲ max(1, ρ/(1 − ρ)) max(d_j, d_{j−1}/10),    ρ = max(‖r_j‖/‖r_{j−1}‖, d_j/d_{j−1})

    where the 1 and the change before keep one lucky step from being believed. A direction that B sees and
    that no solve has come to yet can still fool it, as any rule that looks at changes. The true residual
    comes with each comparison, so the solver goes on from the truth.

    The solver's ``rtol`` is not asked for, and its ``max_steps`` are for each tenth of the residual. Where
    values cannot be read, all forty tenths run to their limit, with x held once it is right. Costs a product
    for each comparison.

    Args:
        solver: how the residual is taken down.
        accuracy: the relative error to reach, between 0 and 1; the report gives the estimate of it.

    Raises:
        ArgumentError: if it is no such number, around a solver that takes a single step, and where x is
        wanted
            for its own sake, as by `hypergrad.solve`.
    """

    rank: ClassVar[int] = 2

    solver: Solver
    accuracy: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.accuracy) and 0 < self.accuracy < 1):
            raise ArgumentError(
                f"UntilAccurate: accuracy = {self.accuracy!r}; it is a number between 0 and 1"
            )
        if not self.solver.differentiable:
            raise ArgumentError(f"UntilAccurate: a solve of {self.solver!r} does not go on until it is right")

    @property
    def promises_nothing(self) -> bool:
        return False

    @property
    def truncates(self) -> bool:
        return False

    def target(self, system: System) -> Scalar:
        """Infinite: the residual is not what it is judged by."""
        return float("inf") + 0.0 * vectors.norm(system.backend, system.v)

    def prepared(self, system: System, memory: Tree | None) -> System:
        if system.both is None:
            raise ArgumentError(
                "UntilAccurate asks for the error of a hypergradient, and hg.solve has none: give the solver "
                "an rtol"
            )
        return self.solver.prepared(system, memory)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = self.ready(system, memory).begun()
        if system.both is None:  # a derivative of a solution, which is not a hypergradient
            nan = float("nan") * vectors.norm(system.backend, system.v)
            return self.solver.solve(system, memory)._replace(error=nan)
        backend, xp, both, direct = system.backend, system.backend.xp, system.both, system.direct
        solver, products = self.solver.for_one_system(system)
        scale = vectors.norm(backend, system.v)
        floor = 10 * rounding(backend, scale) * scale

        def going(it: _Part) -> Any:
            wrong = it.error > self.accuracy * vectors.norm(
                backend, vectors.subtract(backend, direct, it.mixed)
            )
            return wrong & (it.k < _BLOCKS) & (it.failure == Failure.NONE) & (it.size > floor)

        def body(it: _Part) -> _Part:
            goal = xp.maximum(_BLOCK * it.size, floor)
            block = replace(
                system,
                x=it.x,
                r=it.r,
                goal=goal,
                direction=it.direction,
                met=it.curvature,
                spent=0,
                trials=None,
            )
            solution = solver.solve(block, memory)
            ax, mixed, _ = both(solution.x)
            r = vectors.subtract(backend, system.v, ax)
            size = vectors.norm(backend, r)
            change = vectors.norm(backend, vectors.subtract(backend, mixed, it.mixed))
            some = xp.where(it.size > 0, it.size, xp.ones_like(it.size))
            slower = change / xp.where(it.change > 0, it.change, xp.ones_like(change))
            rho = xp.maximum(size / some, xp.where(it.k > 1, slower, 0.0 * slower))
            rho = xp.minimum(rho, 0.9 + 0.0 * rho)
            # A solve that used up its steps and still came nearer goes on.
            tired = (solution.failure == Failure.MAX_STEPS) & (size < 0.5 * it.size)
            return _Part(
                solution.x,
                r,
                size,
                mixed,
                change,
                xp.maximum(rho / (1 - rho), 1.0 + 0.0 * rho) * xp.maximum(change, _BLOCK * it.change),
                it.k + 1,
                it.iterations + solution.iterations,
                it.products + solution.products + 1,
                xp.where(tired, int(Failure.NONE), solution.failure),
                xp.where(solution.curvature > it.curvature, solution.curvature, it.curvature),
                xp.where(solution.smallest < it.smallest, solution.smallest, it.smallest),
                it.direction if solution.direction is None else solution.direction,
            )

        size = vectors.norm(backend, system.r)
        nothing = 0.0 * size
        start = _Part(
            system.x,
            system.r,
            size,
            both(system.x).mixed,
            float("inf") + nothing,  # nothing has changed yet, and the first change is not believed
            float("inf") + nothing,
            0,
            0,
            1 + products + system.spent,
            int(Failure.NONE),
            nothing + system.met,
            float("inf") + nothing if system.trials is None else nothing + system.trials.smallest,
            backend.zeros(system.v),
        )
        end: _Part = backend.while_loop(going, body, start, _BLOCKS)
        whole = vectors.norm(backend, vectors.subtract(backend, direct, end.mixed))
        reached = (end.error <= self.accuracy * whole) | (end.size <= floor)
        failure = xp.where(reached, int(Failure.NONE), end.failure)
        failure = xp.where(~reached & (failure == Failure.NONE), int(Failure.MAX_STEPS), failure)
        some = xp.where(whole > 0, whole, xp.ones_like(whole))
        smallest = met(backend, end.smallest)
        # Where only rounding is left, that of x is no more than this.
        length = vectors.norm(backend, end.x)
        rounded = end.size / xp.where(length > 0, smallest * length, xp.ones_like(length))
        measured = xp.where(end.error < float("inf"), end.error, rounded * some)
        error = xp.where(end.size <= floor, measured, end.error) / some
        solution = Solution(
            end.x, end.iterations, end.products, failure, end.curvature, smallest, error=error
        )
        return self.solver.finished(system, solution)
