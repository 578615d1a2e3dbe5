r"""The adjoint x of the implicit function theorem, (∂_θ G)ᵀ x = ∂_θ C2, and how it is found.

It is the Lagrange multiplier of the condition G(θ, λ) = 0, and all that a hypergradient needs to know of how
training responds: dC2/dλ = ∂_λ C2 − (∂_λ G)ᵀ x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.estimators.accuracy import until_accurate
from hypergrad.problems.base import Validation
from hypergrad.second_order.condition import Stationary
from hypergrad.solvers import Amortised, Solution, Solver, System
from hypergrad.solvers.levenberg_marquardt import LevenbergMarquardt
from hypergrad.solvers.solve import judged, spoiled

Curved = Callable[[Tree, Any], Tree]
"""(p, k) -> H p, or what stands for it, where k counts products."""


class Adjoint(NamedTuple):
    """x, A x with A = ∂_θ G + δI, r = v − A x, (∂_λ G)ᵀ x, and how the solve went.

    ``damping`` is δ, ``later`` the one to begin with next time, ``error`` the estimated relative error of the
    hypergradient, if one was asked for, ``difference_error`` that of a finite difference, if there is one.
    """

    x: Tree
    ax: Tree
    r: Tree
    mixed: Tree
    solution: Solution
    damping: Scalar
    later: Tree
    error: Scalar
    difference_error: Scalar


@final
@dataclass(frozen=True)
class AdjointSystem:
    """One system (∂_θ G)ᵀ x = ∂_θ C2 and what is asked of its solution.

    ``curved`` stands for ∂_θ G in the solve, and is it itself if it is ``exact``; ``varies`` says that it is
    another with each product.
    """

    backend: Backend
    at: Stationary
    validation: Validation
    solver: Solver
    symmetric: bool
    definite: bool
    curved: Curved
    exact: bool = True
    varies: bool = False
    accuracy: float | None = None

    def solve(self, damping: float | LevenbergMarquardt, start: Tree | None, carried: Tree = ()) -> Adjoint:
        """Find x from ``start``, or from 0; a δ that is looked for begins with the one ``carried`` on."""
        if not isinstance(damping, LevenbergMarquardt):
            return self._solve(damping, start)
        backend = self.backend
        first = carried
        if isinstance(carried, tuple):
            first = 0.0 * vectors.norm(backend, backend.detach(self.validation.v)) + damping.initial
        nothing = backend.zeros(self.validation.v) if start is None else start
        tried = damping.search(backend, lambda delta: self._try(delta, start), first, nothing)
        made = self._solve(tried.damping, tried.x)
        last, fine = made.solution, int(Failure.NONE)
        # What failed with this δ is not believed if it goes well from another start.
        failure = backend.xp.where(tried.failure == fine, last.failure, tried.failure)
        met = backend.xp.where(last.smallest < tried.smallest, last.smallest, tried.smallest)
        solution = last._replace(
            products=last.products + tried.products,
            iterations=last.iterations + tried.iterations,
            failure=failure,
            smallest=met,
        )
        return made._replace(solution=solution, later=damping.after(backend, tried.damping, failure))

    def _solve(self, delta: Scalar, start: Tree | None) -> Adjoint:
        backend, v, nan = self.backend, self.validation.v, float("nan")
        direct = backend.detach(self.validation.direct)

        def respond(x: Tree) -> tuple[Tree, Tree]:
            ax, mixed, _ = self._respond(x, delta)
            return backend.detach(ax), backend.detach(mixed)

        def run(matvec: Callable[[Tree], Tree], v: Tree) -> tuple[Tree, tuple[Solution, Scalar]]:
            system = self._system(lambda p, k: matvec(p), v, start)
            if self.accuracy is None:
                solution, error = self.solver.solve(backend, system), nan
            else:
                solution, error = until_accurate(backend, self.solver, system, respond, direct, self.accuracy)
            return solution.x, (_bare(solution), error)

        def again(matvec: Callable[[Tree], Tree], v: Tree) -> tuple[Tree, tuple[Solution, Scalar]]:
            system = System.at_rest(backend, lambda p, k: matvec(p), v, self.symmetric, self.definite)
            solution = self.solver.solve(backend, system)
            solution = judged(backend, self.solver, system, solution, _left(backend, system, solution.x))
            return spoiled(backend, solution).x, (_bare(solution), nan)

        if self.varies or (self.solver.truncates and self.accuracy is None):
            # A truncation is what it is, and so is its derivative: that of its own few steps.
            solution, error = self.solver.solve(backend, self._system(self._product(delta), v, start)), nan
            x = solution.x
        else:
            x, (solution, error) = backend.linear_solve(
                lambda p: self._product(delta)(p, 0), v, run, again, self.symmetric
            )
        # One pull-back along x gives (∂_θ G)ᵀ x and (∂_λ G)ᵀ x together.
        ax, mixed, difference_error = self._respond(x, delta)
        x, ax = backend.detach(x), backend.detach(ax)
        r = vectors.subtract(backend, backend.detach(v), ax)
        goal = None if self.accuracy is None else float("inf") + 0.0 * vectors.norm(backend, r)
        system = System(self._product(delta), backend.detach(v), x, r, self.symmetric, self.definite, goal)
        solution = judged(backend, self.solver, system, solution._replace(x=x), r)
        solution = solution._replace(products=solution.products + self._to_begin(start))
        return Adjoint(x, ax, r, mixed, solution, delta, (), error, difference_error)

    def _try(self, delta: Scalar, start: Tree | None) -> Solution:
        """A solve with this δ, as a constant, judged."""
        backend, v = self.backend, self.backend.detach(self.validation.v)
        product = self._product(delta)
        system = self._system(lambda p, k: backend.detach(product(p, k)), v, start)
        solution = self.solver.solve(backend, system)
        solution = solution._replace(products=solution.products + self._to_begin(start))
        return judged(backend, self.solver, system, solution, _left(backend, system, solution.x))

    def _to_begin(self, start: Tree | None) -> int:
        """Products to find the residual to begin with."""
        return 0 if start is None or isinstance(self.solver, Amortised) else 1

    def _system(self, product: Curved, v: Tree, start: Tree | None) -> System:
        if isinstance(self.solver, Amortised):
            return System(
                product,
                v,
                self.backend.zeros(v) if start is None else start,
                v,
                self.symmetric,
                self.definite,
            )
        if start is None:
            return System.at_rest(self.backend, product, v, self.symmetric, self.definite)
        return System.begun(self.backend, product, v, start, self.symmetric, self.definite)

    def _product(self, delta: Scalar) -> Curved:
        return lambda p, k: self._damped(delta, p, self.curved(p, k))

    def _damped(self, delta: Scalar, p: Tree, hp: Tree) -> Tree:
        """H p + δ p, for which nothing is done where δ is known to be 0."""
        return hp if isinstance(delta, int | float) and delta == 0 else self.backend.axpy(delta, p, hp)

    def _respond(self, x: Tree, delta: Scalar) -> tuple[Tree, Tree, Scalar]:
        """A x, (∂_λ G)ᵀ x, and the error of a difference."""
        ax, mixed, error = self.at.both(x)
        if not self.exact:
            ax = self.curved(x, 0)
        return self._damped(delta, x, ax), mixed, error


def _left(backend: Backend, system: System, x: Tree) -> Tree:
    return vectors.subtract(backend, system.v, system.product(x, 0))


def _bare(solution: Solution) -> Solution:
    """A solution without its x, in numbers that a compiled program can return."""
    failure = solution.failure
    return solution._replace(
        x=(), direction=(), failure=int(failure) if isinstance(failure, int) else failure
    )
