"""The implicit function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, final

from hypergrad.backend import Backend, Tree, find_backend, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import (
    ArgumentError,
    Failure,
    InnerNotConvergedError,
    InnerNotConvergedWarning,
    SolveError,
    SolveWarning,
    not_converged,
)
from hypergrad.estimators.accuracy import bound
from hypergrad.estimators.adjoint import AdjointSystem
from hypergrad.estimators.base import (
    Estimate,
    HypergradientEstimator,
    State,
    assemble,
    inner_reaches,
    inner_state,
)
from hypergrad.problems.base import Problem, Validation
from hypergrad.problems.batches import Batches, every_batch, one_batch, stream
from hypergrad.problems.bilevel import Bilevel
from hypergrad.problems.step import Inner, Seen, observe
from hypergrad.second_order.condition import Stationary, stationary
from hypergrad.second_order.differences import FiniteDifference, check_mixed
from hypergrad.second_order.gauss_newton import GaussNewton
from hypergrad.solvers import CG, Amortised, Solver
from hypergrad.solvers.diagnosis import diagnosis
from hypergrad.solvers.levenberg_marquardt import LevenbergMarquardt
from hypergrad.solvers.solve import check_symmetry
from hypergrad.updates import UpdateRule, as_update_rule


class Carried(NamedTuple):
    """What `Implicit` carries on: the x with which the next solve begins, and its damping δ."""

    x: Tree = ()
    damping: Tree = ()


@final
@dataclass(frozen=True)
class Implicit(HypergradientEstimator):
    r"""The implicit function theorem with an inexact inverse-Hessian product (Foo et al. 2008, eq. 4 of
    Luketina et al. 2016; Lorraine et al. 2020).

        dC2/dλ = ∂_λ C2 − (∂²_λθ C̃1)ᵀ x,    (H + δI) x = ∇_θ C2,    H = ∂²_θθ C̃1

    Exact where θ solves the inner problem and the solve is exact; the error is of first order in both
    residuals (Pedregosa 2016, theorem 1). It does not train: θ stays where it is.

    Cost: 2 gradients and K + 1 products for K products of the solver. The gradient's graph is kept and
    every product is one pull-back through it; the last one gives the mixed term and, in the same pass,
    the true residual Hx − v, whatever the solver believed. Memory: one training graph for each batch.

    The estimate is itself differentiable, by whatever the losses depend on, at a fixed θ: another solve of
    the same kind for each derivative, none through the solver's steps. A derivative whose solve fails is NaN.

    Args:
        solver: how x is found.
        damping: δ ≥ 0, a bias towards x = v/δ that makes the solve well-posed; or `LevenbergMarquardt`, which
            looks for the least δ that does.
        tolerance: the ‖∇C̃1‖ up to which θ counts as an optimum, or ``None`` for online use, where θ is on its
            way and nobody expects one.
        strict: make it an error, not a warning, to be further away than that.
        on_failure: what a failed solve does: ``"raise"``, or ``"warn"`` and accept the bias.
        mixed: how H and ∂²_λθ C̃1 are multiplied: exactly, or by a `FiniteDifference` of gradients where
            they do not exist; a product then costs 2 gradients, and its error bounds the residual below.
        curvature: what stands for H in the solve, the Hessian itself or `GaussNewton`.
        update: the update rule whose fixed point θ is, where that is no gradient step, such as `Proximal`:
            then (I − ∂_θΦ)ᵀ x = ∇_θ C2 is solved, which is not symmetric, and ‖θ − Φ(θ)‖ is the distance from
            it. A rule without a state of its own.
        warm_start: begin each solve with the x of the last estimate, which the state carries on.
        accuracy: solve until the relative error of the *hypergradient* is below this, by its own estimate,
            instead of the residual below the solver's ``rtol``; its ``max_steps`` are then for each tenth of
            the residual. See `hypergrad.accuracy`. Where values cannot be read without waiting (CUDA), all
            forty tenths run to their ``max_steps``, with x held once it is right.
        bound: report HOAG's bound on the error, from both residuals; costs 2 gradients and 6 products more.
        fresh: take the Hessian of another batch of T1 for each product, of a list in turn or of a function
            ``t -> batch`` from this step on (Lorraine et al. 2020). For solvers that promise nothing, as
            `Neumann` without ``rtol``. A gradient more for each product, and draws of its own.

    Raises:
        DifferenceError: if a finite difference is not accurate enough.
        SolveError: if the solve failed, with the reason, the step and the true residual.
        InnerNotConvergedError: away from the optimum, if ``strict``.

    Warns:
        InnerNotConvergedWarning: away from the optimum. SolveWarning: with ``on_failure="warn"``.
    """

    by_hand: ClassVar[bool] = True
    at_saddles: ClassVar[bool] = True

    solver: Solver = field(default_factory=CG)
    damping: float | LevenbergMarquardt = 0.0
    tolerance: float | None = 1e-3
    strict: bool = False
    on_failure: Literal["raise", "warn"] = "raise"
    mixed: FiniteDifference | None = None
    curvature: GaussNewton | None = None
    update: Any = None
    warm_start: bool = False
    accuracy: float | None = None
    bound: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise ArgumentError(f"Implicit: solver = {self.solver!r}; it is a solver such as hg.CG()")
        fixed = is_number(self.damping) and 0 <= self.damping < float("inf")  # type: ignore[operator]
        if not (self._searches or fixed):
            raise ArgumentError(
                f"Implicit: damping = {self.damping!r}; it is a number ≥ 0, or hg.LevenbergMarquardt()"
            )
        if self.tolerance is not None and not (is_number(self.tolerance) and self.tolerance > 0):
            raise ArgumentError(f"Implicit: tolerance = {self.tolerance!r}; it is a positive number, or None")
        if self.strict and self.tolerance is None:
            raise ArgumentError("Implicit: strict=True asks for an optimum, and tolerance=None for none")
        if self.on_failure not in ("raise", "warn"):
            raise ArgumentError(f"Implicit: on_failure = {self.on_failure!r}; it is 'raise' or 'warn'")
        check_mixed("Implicit", self.mixed)
        if self.curvature is not None and not isinstance(self.curvature, GaussNewton):
            raise ArgumentError(f"Implicit: curvature = {self.curvature!r}; it is None or hg.GaussNewton(…)")
        if self.update is not None:
            as_update_rule(self.update)
            if self.mixed is not None or self.curvature is not None:
                raise ArgumentError("Implicit: update= has no Hessian; leave mixed= and curvature= out")
            check_symmetry(self.solver, False)
        if self.accuracy is not None and not (is_number(self.accuracy) and 0 < self.accuracy < 1):
            raise ArgumentError(f"Implicit: accuracy = {self.accuracy!r}; it is a number between 0 and 1")
        one_step = isinstance(self.solver, Amortised)
        if one_step and (self._searches or self.accuracy is not None or self.fresh):
            raise ArgumentError(
                "Implicit: hg.Amortised takes one step an estimate, with the batch of that, which neither "
                "fails nor ends: leave accuracy=, fresh= and LevenbergMarquardt out"
            )
        if self._searches and self.accuracy is not None:
            raise ArgumentError(
                "Implicit: LevenbergMarquardt looks for a δ with which the residual falls to the solver's "
                "rtol, and accuracy= does not ask for that: choose one of them"
            )
        if self.bound and self.curvature is not None:
            raise ArgumentError("Implicit: bound= needs the curvature of C̃1 itself; leave curvature= out")
        promises = not self.solver.promises_nothing or self.accuracy is not None
        if self.fresh and (promises or self._searches or self.mixed is not None or self.bound):
            raise ArgumentError(
                "Implicit: with fresh=True each product is with another matrix, of which no residual can be "
                "promised: take hg.Neumann without rtol, and leave accuracy=, bound=, mixed= and "
                "LevenbergMarquardt out"
            )

    @property
    def training_steps(self) -> int:
        """None: θ stays where it is."""
        return 0

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params)

    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate:
        batches = every_batch("train", train, state.step)
        z, rule = inner_state(state), None if self.update is None else as_update_rule(self.update)
        symmetric = problem.symmetric and rule is None
        self._check_fits(backend, problem, z, rule, symmetric)
        if self.fresh or isinstance(self.solver, Amortised):
            # What moves on with each product, or with each estimate, has no derivative of its own.
            z, hparams = backend.nondifferentiable((z, hparams), type(self.solver).__name__)
        draws = backend.random.state()
        at = stationary(backend, problem, z, hparams, batches, rule, self.mixed)
        seen = Seen(at.value, float("nan"))
        if at.residual is None and self.strict:
            raise ArgumentError("Implicit: strict=True needs ‖∇C̃1‖: give Derivatives(inner_grad=…)")
        if at.residual is not None:
            seen = observe(backend, at.value, at.residual, (), state.step)
        val_batch = one_batch("val", val, state.step)
        judging = backend.random.state()
        validation = problem.validation(backend, z.params, hparams, val_batch, z.aux)

        curved: Callable[[Tree, Any], Tree] = lambda p, k: at.product(p)  # noqa: E731
        if self.curvature is not None:
            approximate = self.curvature.products(backend, z.params, hparams, batches, draws)
            curved = lambda p, k: approximate(p)  # noqa: E731
        if self.fresh:
            curved = self._fresh(backend, problem, z, hparams, train, state.step, rule)
        system = AdjointSystem(
            backend, at, validation, self.solver, symmetric, problem.definite, curved,
            exact=self.curvature is None, varies=self.fresh, accuracy=self.accuracy,
        )  # fmt: skip
        carried = state.memory if isinstance(state.memory, Carried) else Carried()
        begun = self._warm and not _is_empty(carried.x)
        found = system.solve(self.damping, carried.x if begun else None, carried.damping)
        if self._warm or self._searches:
            kept = self.solver.remembered(backend, found.x, found.r) if self._warm else ()
            state = state._replace(memory=Carried(kept, found.later))
        largest = float("nan")
        if self.bound:

            def elsewhere(params: Tree) -> tuple[Stationary, Validation]:
                there = z._replace(params=params)
                with backend.random.replay(draws):
                    far = stationary(backend, problem, there, hparams, batches, rule, self.mixed)
                with backend.random.replay(judging):
                    return far, problem.validation(backend, params, hparams, val_batch, z.aux)

            largest = bound(backend, at, validation, z.params, elsewhere, found.solution, found.damping)
        solution = found.solution
        spent = at.spent(solution.products + (6 if self.bound else 0))
        if self.bound:
            spent["gradients"] = spent["gradients"] + len(batches) + 1
        if self.fresh:
            spent["gradients"] = spent["gradients"] + solution.products
        return assemble(
            backend,
            validation,
            vectors.scale(backend, -1.0, found.mixed),
            at.responds(),
            seen,
            state,
            None if self.allow_unused else inner_reaches(backend, problem, z, hparams, lambda: batches[0]),
            difference_error=found.difference_error,
            **spent,
            residual=backend.detach(solution.residual),
            iterations=solution.iterations,
            curvature=backend.detach(solution.curvature),
            smallest_curvature=backend.detach(solution.smallest),
            failure=solution.failure,
            damping=found.damping,
            error=backend.detach(found.error),
            error_bound=backend.detach(largest),
        )

    def _check_fits(
        self, backend: Backend, problem: Problem, z: Inner, rule: UpdateRule | None, symmetric: bool
    ) -> None:
        check_symmetry(self.solver, symmetric)
        if rule is not None and backend.flatten(rule.init(backend, z.params))[0]:
            raise ArgumentError(
                f"Implicit: update = {self.update!r} carries a state, of which a fixed point knows nothing: "
                "give the rule without momentum, whose fixed points are the same"
            )
        losses = isinstance(problem, Bilevel)
        for name in ("mixed", "curvature", "update"):
            if getattr(self, name) is not None and not losses:
                raise ArgumentError(
                    f"Implicit: {name}= is of a training loss, and {type(problem).__name__} has none that a "
                    "framework differentiates: leave it out"
                )

    def _fresh(
        self,
        backend: Backend,
        problem: Problem,
        z: Inner,
        hparams: Tree,
        train: Batches,
        step: Any,
        rule: UpdateRule | None,
    ) -> Callable[[Tree, Any], Tree]:
        """Products with the Hessian of batch after batch."""
        if isinstance(train, Iterator) and backend.compiles:
            raise ArgumentError(
                "Implicit: with fresh=True a compiled program takes its batches from a function t -> batch "
                "or a list, and not from an iterator"
            )
        source = stream(backend, "train", train)

        def product(p: Tree, k: Any) -> Tree:
            batches = [source(step + k)]
            if self.curvature is not None:
                return self.curvature.products(backend, z.params, hparams, batches)(p)
            return stationary(backend, problem, z, hparams, batches, rule).product(p)

        return product

    @property
    def reads_on(self) -> bool:
        return self.fresh

    @property
    def _warm(self) -> bool:
        return self.warm_start or isinstance(self.solver, Amortised)

    @property
    def _searches(self) -> bool:
        return isinstance(self.damping, LevenbergMarquardt)

    def _memory(self, backend: Backend, state: State, hparams: Tree) -> Tree:
        if not (self._warm or self._searches):
            return state.memory
        damping: Tree = ()
        if isinstance(self.damping, LevenbergMarquardt):
            damping = self.damping.initial + 0.0 * vectors.norm(backend, state.params)
        return Carried(backend.zeros(state.params) if self._warm else (), damping)

    def _check(self, backend: Backend, out: Estimate) -> None:
        report = out.report
        if self.mixed is not None:
            self.mixed.check(report.difference_error)
        failure = Failure(int(backend.to_numpy(report.failure)))
        away = float(backend.to_numpy(report.inner_gradient_norm))
        if failure is not Failure.NONE:
            steps, relative = int(report.iterations), float(report.residual)
            message = diagnosis(failure, self.solver, steps, relative, away, float(report.curvature))
            if self.on_failure == "raise":
                raise SolveError(message, failure, steps, relative)
            warnings.warn(message, SolveWarning, stacklevel=4)
        if self.tolerance is not None and away > self.tolerance:
            if self.strict:
                raise InnerNotConvergedError(away, self.tolerance)
            warnings.warn(not_converged(away, self.tolerance), InnerNotConvergedWarning, stacklevel=4)

    def _sound(self, backend: Backend, out: Estimate) -> Any:
        report = out.report
        sound = self.mixed is None or self.mixed.accepts(report.difference_error)
        if self.on_failure == "raise":
            sound = (report.failure == Failure.NONE) & sound
        if self.tolerance is not None and self.strict:
            sound = (report.inner_gradient_norm <= self.tolerance) & sound
        return sound


def adjoint(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    train: Batches,
    val: Batches,
    solver: Solver | None = None,
    *,
    aux: Tree = (),
    backend: Backend | str | None = None,
) -> Tree:
    """X of the implicit function theorem, (∂_θ G)ᵀ x = ∂_θ C2: a tree like the parameters.

    For the level above a bilevel problem, see `hypergrad.Level`, and for those who want to look at it. A
    constant: it has no derivative.

    Raises:
        As `Implicit`, by whose solve it is found; ``solver`` is `CG` with ``rtol=1e-10`` if it is not given.
    """
    implicit = Implicit(solver or CG(1000, rtol=1e-10), warm_start=True, allow_unused=True)
    found = find_backend(params, hparams, backend=backend)
    params, hparams = found.nondifferentiable((params, hparams), "hg.adjoint")
    state = implicit.init(problem, params, hparams, aux=aux, backend=found)
    return implicit.estimate(problem, state, hparams, train, val, backend=found).state.memory.x


def _is_empty(tree: Tree) -> bool:
    """Is this the () that stands for nothing? No tree of parameters is."""
    return isinstance(tree, tuple) and not tree
