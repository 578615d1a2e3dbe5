"""Adaptive damping."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Solver, check_count
from hypergrad.solvers.residual import with_true_residual
from hypergrad.solvers.system import Solution, System, Trials
from hypergrad.solvers.wrapper import Wrapper


class Damping(NamedTuple):
    """The δ of the next solve, and the memory of the wrapped solver."""

    delta: Scalar
    inner: Tree | None


class _Search(NamedTuple):
    delta: Scalar
    failure: Any
    x: Tree
    smallest: Scalar
    products: Any
    iterations: Any
    tried: Any


@final
@dataclass(frozen=True)
class LevenbergMarquardt(Wrapper):
    r"""Find a small δ with which the solve of (A + δI) x = v succeeds (Levenberg 1944, Marquardt 1963).

        δ ← factor · δ    after a failed solve, which is then repeated
        δ ← δ / factor    for the next estimate, after a successful solve

    A fixed δ large enough for the worst Hessian of a run biases all other solves; this one adapts, and is
    kept in the solver's memory. A solve fails where `SolveError` would be raised: negative curvature, a
    singular A, a residual above ``rtol`` after ``max_steps``. The report gives δ as the solve's shift.

    Args:
        solver: solves each damped system.
        initial: δ of the first estimate.
        factor: the factor by which δ changes, above 1.
        smallest: the lower bound of δ.
        attempts: the most solves in one estimate; if all of them fail, the solve fails.

    Raises:
        ArgumentError: for numbers out of range, and for a solver that neither fails nor succeeds.
    """

    rank: ClassVar[int] = 1

    solver: Solver
    initial: float = 1e-4
    factor: float = 10.0
    smallest: float = 1e-10
    attempts: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.initial, self.factor, self.smallest
        valid = all(is_number(x) and 0 < x < float("inf") for x in sizes)
        if not (valid and self.factor > 1 and self.smallest <= self.initial):
            raise ArgumentError(f"{self!r}: it needs 0 < smallest <= initial, and factor > 1")
        check_count("LevenbergMarquardt", "attempts", self.attempts)
        if not self.solver.differentiable:
            raise ArgumentError(
                "LevenbergMarquardt searches for a δ with which a solve succeeds, but a solve by "
                f"{self.solver!r} neither fails nor succeeds: use hg.Damped"
            )

    def init(self, backend: Backend, v: Tree) -> Damping:
        return Damping(self.initial + 0.0 * vectors.norm(backend, v), self.solver.init(backend, v))

    def prepared(self, system: System, memory: Tree | None) -> System:
        """Return the system with the δ of the last trial, starting where that trial ended."""
        backend, xp = system.backend, system.backend.xp
        damping: Damping = self.init(backend, system.v) if memory is None else memory

        def going(it: _Search) -> Any:
            return (it.failure != int(Failure.NONE)) & (it.tried < self.attempts)

        def body(it: _Search) -> _Search:
            delta = xp.where(it.tried > 0, self.factor * it.delta, it.delta)
            damped = self._damped(system, delta, damping)
            solution = self.solver.solve(damped, damping.inner)
            r = vectors.subtract(backend, damped.v, damped.product(solution.x))
            solution = with_true_residual(self.solver, damped, solution, r)
            return _Search(
                delta,
                solution.failure,
                solution.x,
                solution.smallest,
                it.products + solution.products + 1,  # one more for the true residual
                it.iterations + solution.iterations,
                it.tried + 1,
            )

        x = backend.zeros(system.v) if system.x is None else system.x
        start = _Search(damping.delta, int(Failure.MAX_STEPS), x, float("nan") * damping.delta, 0, 0, 0)
        end: _Search = backend.while_loop(going, body, start, self.attempts)
        trials = Trials(end.failure, end.smallest, end.products, end.iterations)
        return replace(self._damped(system, end.delta, damping), x=end.x, r=None, trials=trials)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = self.ready(system, memory)
        solution = self.solver.solve(system, None if memory is None else memory.inner)
        return self.finished(system, solution)

    def finished(self, system: System, solution: Solution) -> Solution:
        xp, trials = system.backend.xp, system.trials
        delta: Scalar = 0.0 if system.shift is None else system.shift
        if trials is None:  # a derivative, solved with the same δ
            return solution._replace(shift=delta, memory=Damping(delta, solution.memory))
        # A solve that failed at this δ stays failed, even if restarting from its iterate succeeds.
        failed = trials.failure != int(Failure.NONE)
        lower = xp.maximum(delta / self.factor, self.smallest + 0.0 * delta)
        return solution._replace(
            products=solution.products + trials.products,
            iterations=solution.iterations + trials.iterations,
            failure=xp.where(failed, trials.failure, solution.failure),
            smallest=xp.where(solution.smallest < trials.smallest, solution.smallest, trials.smallest),
            shift=delta,
            memory=Damping(xp.where(failed, delta, lower), solution.memory),
        )

    def _damped(self, system: System, delta: Scalar, damping: Damping) -> System:
        return replace(self.solver.prepared(system.shifted(delta), damping.inner), shift=delta)
