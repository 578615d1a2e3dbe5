"""Damping that finds its own size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Solver, check_count
from hypergrad.solvers.residual import judge
from hypergrad.solvers.system import Solution, System, Trials
from hypergrad.solvers.wrapper import Wrapper


class Damping(NamedTuple):
    """The δ of the next solve, and the memory of the solver that it is made of."""

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
    r"""As little damping δ as the solve of (A + δI) x = v succeeds with (Levenberg 1944, Marquardt 1963).

        δ ← factor · δ    after a solve that failed, which then begins again
        δ ← δ / factor    for the next estimate, after one that succeeded

    A fixed δ large enough for the worst Hessian of a run biases all the others; this one follows, and is kept
    in the solver's memory. What counts as a failure is what `SolveError` would say: negative curvature, a
    singular A, a residual above ``rtol`` after ``max_steps``. The report gives δ as the solve's shift.

    Args:
        solver: how each damped system is solved.
        initial: δ of the first estimate.
        factor: more than 1.
        smallest: δ is never below it.
        attempts: solves at most in one estimate; after the last, a failure is one.

    Raises:
        ArgumentError: for numbers out of range, and around a solver that neither fails nor ends.
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
        fine = all(is_number(x) and 0 < x < float("inf") for x in sizes)
        if not (fine and self.factor > 1 and self.smallest <= self.initial):
            raise ArgumentError(f"{self!r}: it takes 0 < smallest <= initial, and factor > 1")
        check_count("LevenbergMarquardt", "attempts", self.attempts)
        if not self.solver.differentiable:
            raise ArgumentError(
                f"LevenbergMarquardt looks for a δ with which a solve succeeds, and that of {self.solver!r} "
                "neither fails nor succeeds: take hg.Damped"
            )

    def init(self, backend: Backend, v: Tree) -> Damping:
        return Damping(self.initial + 0.0 * vectors.norm(backend, v), self.solver.init(backend, v))

    def prepared(self, system: System, memory: Tree | None) -> System:
        """The system with the δ that was found, begun where the last trial ended."""
        backend, xp = system.backend, system.backend.xp
        known: Damping = self.init(backend, system.v) if memory is None else memory

        def going(it: _Search) -> Any:
            return (it.failure != int(Failure.NONE)) & (it.tried < self.attempts)

        def body(it: _Search) -> _Search:
            delta = xp.where(it.tried > 0, self.factor * it.delta, it.delta)
            damped = self._damped(system, delta, known)
            solution = self.solver.solve(damped, known.inner)
            r = vectors.subtract(backend, damped.v, damped.product(solution.x))
            solution = judge(self.solver, damped, solution, r)
            return _Search(
                delta,
                solution.failure,
                solution.x,
                solution.smallest,
                it.products + solution.products + 1,  # one more, to judge it by
                it.iterations + solution.iterations,
                it.tried + 1,
            )

        x = backend.zeros(system.v) if system.x is None else system.x
        start = _Search(known.delta, int(Failure.MAX_STEPS), x, float("nan") * known.delta, 0, 0, 0)
        end: _Search = backend.while_loop(going, body, start, self.attempts)
        trials = Trials(end.failure, end.smallest, end.products, end.iterations)
        return replace(self._damped(system, end.delta, known), x=end.x, r=None, trials=trials)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = self.ready(system, memory)
        solution = self.solver.solve(system, None if memory is None else memory.inner)
        return self.finished(system, solution)

    def finished(self, system: System, solution: Solution) -> Solution:
        xp, trials = system.backend.xp, system.trials
        delta: Scalar = 0.0 if system.shift is None else system.shift
        if trials is None:  # a derivative, whose solve is of the same system
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

    def _damped(self, system: System, delta: Scalar, known: Damping) -> System:
        return replace(self.solver.prepared(system.shifted(delta), known.inner), shift=delta)
