"""Solves that stop when the hypergradient is accurate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Solver, nan_if_infinite, rounding
from hypergrad.solvers.system import Solution, System
from hypergrad.solvers.wrapper import Wrapper

_REDUCTION = 0.1
_MAX_BLOCKS = 40


class _Progress(NamedTuple):
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
    r"""Solve until the relative error of the hypergradient is small, whatever the residual.

    The residual is reduced in blocks, to a tenth in each. After block j the hypergradient ĝ_j = c − B x_j is
    compared with the one before, d_j = ‖ĝ_j − ĝ_{j−1}‖. If the remaining changes shrink by ρ in each block,

        ‖ĝ_j − ĝ‖ ≲ max(1, ρ/(1 − ρ)) max(d_j, d_{j−1}/10),    ρ = max(‖r_j‖/‖r_{j−1}‖, d_j/d_{j−1})

    where the 1 and d_{j−1} guard against one block that happens to change little. Like any rule based on
    changes, it can still be wrong if B acts on a direction that no block has reached yet. Each comparison
    also measures the true residual, from which the solver continues.

    The solver's ``rtol`` is ignored, and its ``max_steps`` apply to each block. Where values cannot be read,
    all forty blocks run to their limit, with x held fixed once it is accurate. Costs one product per
    comparison.

    Args:
        solver: reduces the residual.
        accuracy: the relative error to reach, between 0 and 1; the report gives its estimate.

    Raises:
        ArgumentError: if ``accuracy`` is out of range, for a solver that takes a single step, and where there
            is no hypergradient, as in `hypergrad.solve`.
    """

    rank: ClassVar[int] = 2

    solver: Solver
    accuracy: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.accuracy) and 0 < self.accuracy < 1):
            raise ArgumentError(
                f"UntilAccurate: accuracy = {self.accuracy!r}; it must be a number between 0 and 1"
            )
        if not self.solver.differentiable:
            raise ArgumentError(f"UntilAccurate: {self.solver!r} takes a single step and cannot continue")

    @property
    def promises_nothing(self) -> bool:
        return False

    @property
    def truncates(self) -> bool:
        return False

    def target(self, system: System) -> Scalar:
        """Return ∞: success does not depend on the residual."""
        return float("inf") + 0.0 * vectors.norm(system.backend, system.v)

    def prepared(self, system: System, memory: Tree | None) -> System:
        if system.both is None:
            raise ArgumentError(
                "UntilAccurate needs a hypergradient, and hg.solve has none: give the solver an rtol instead"
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

        def going(it: _Progress) -> Any:
            inaccurate = it.error > self.accuracy * vectors.norm(
                backend, vectors.subtract(backend, direct, it.mixed)
            )
            return inaccurate & (it.k < _MAX_BLOCKS) & (it.failure == Failure.NONE) & (it.size > floor)

        def body(it: _Progress) -> _Progress:
            goal = xp.maximum(_REDUCTION * it.size, floor)
            block = replace(
                system,
                x=it.x,
                r=it.r,
                goal=goal,
                direction=it.direction,
                curvature=it.curvature,
                spent=0,
                trials=None,
            )
            solution = solver.solve(block, memory)
            ax, mixed, _ = both(solution.x)
            r = vectors.subtract(backend, system.v, ax)
            size = vectors.norm(backend, r)
            change = vectors.norm(backend, vectors.subtract(backend, mixed, it.mixed))
            divisor = xp.where(it.size > 0, it.size, xp.ones_like(it.size))
            slower = change / xp.where(it.change > 0, it.change, xp.ones_like(change))
            rho = xp.maximum(size / divisor, slower)
            rho = xp.minimum(rho, 0.9 + 0.0 * rho)
            # Continue a solve that ran out of iterations but reduced the residual.
            progressing = (solution.failure == Failure.MAX_STEPS) & (size < 0.5 * it.size)
            return _Progress(
                solution.x,
                r,
                size,
                mixed,
                change,
                xp.maximum(rho / (1 - rho), 1.0 + 0.0 * rho) * xp.maximum(change, _REDUCTION * it.change),
                it.k + 1,
                it.iterations + solution.iterations,
                it.products + solution.products + 1,
                xp.where(progressing, int(Failure.NONE), solution.failure),
                xp.where(solution.curvature > it.curvature, solution.curvature, it.curvature),
                xp.where(solution.smallest < it.smallest, solution.smallest, it.smallest),
                it.direction if solution.direction is None else solution.direction,
            )

        size = vectors.norm(backend, system.r)
        zero = 0.0 * size
        start = _Progress(
            system.x,
            system.r,
            size,
            both(system.x).mixed,
            float("inf") + zero,  # no change yet, and the first one alone is not trusted
            float("inf") + zero,
            0,
            0,
            1 + products + system.spent,
            int(Failure.NONE),
            zero + system.curvature,
            float("inf") + zero if system.trials is None else zero + system.trials.smallest,
            backend.zeros(system.v),
        )
        end: _Progress = backend.while_loop(going, body, start, _MAX_BLOCKS)
        hypergradient_norm = vectors.norm(backend, vectors.subtract(backend, direct, end.mixed))
        reached = (end.error <= self.accuracy * hypergradient_norm) | (end.size <= floor)
        failure = xp.where(reached, int(Failure.NONE), end.failure)
        failure = xp.where(~reached & (failure == Failure.NONE), int(Failure.MAX_STEPS), failure)
        divisor = xp.where(hypergradient_norm > 0, hypergradient_norm, xp.ones_like(hypergradient_norm))
        smallest = nan_if_infinite(backend, end.smallest)
        # If the residual is only rounding, this bounds the relative error of x.
        length = vectors.norm(backend, end.x)
        rounded = end.size / xp.where(length > 0, smallest * length, xp.ones_like(length))
        measured = xp.where(end.error < float("inf"), end.error, rounded * divisor)
        error = xp.where(end.size <= floor, measured, end.error) / divisor
        solution = Solution(
            end.x, end.iterations, end.products, failure, end.curvature, smallest, error=error
        )
        return self.solver.finished(system, solution)
