"""The implicit function theorem."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

from hypergrad import vectors
from hypergrad.arguments import is_number
from hypergrad.backend import Backend, Tree
from hypergrad.batches import Batches, every_batch, one_batch
from hypergrad.curvature import GaussNewton
from hypergrad.differences import FiniteDifference, check_mixed
from hypergrad.errors import (
    ArgumentError,
    Failure,
    InnerNotConvergedError,
    InnerNotConvergedWarning,
    SolveError,
    SolveWarning,
    explain,
    not_converged,
)
from hypergrad.estimators.base import (
    Estimate,
    HypergradientEstimator,
    State,
    assemble,
    inner_reaches,
    inner_state,
    validate,
)
from hypergrad.problem import Bilevel
from hypergrad.solvers import CG, Amortised, Solver, System
from hypergrad.solvers.solve import check_symmetry, judged
from hypergrad.stationarity import by_differences, exact
from hypergrad.training import observe
from hypergrad.updates import as_update_rule


class Warm(NamedTuple):
    """What `Implicit` carries on: the x with which the next solve begins."""

    x: Tree


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

    Args:
        solver: how x is found.
        damping: δ ≥ 0, a bias towards x = v/δ that makes the solve well-posed.
        tolerance: the ‖∇C̃1‖ up to which θ counts as an optimum.
        strict: make it an error, not a warning, to be further away than that.
        on_failure: what a failed solve does: ``"raise"``, or ``"warn"`` and accept the bias.
        mixed: how H and ∂²_λθ C̃1 are multiplied: exactly, or by a `FiniteDifference` of gradients where
            they do not exist; a product then costs 2 gradients, and its error bounds the residual below.
        curvature: what stands for H in the solve, the Hessian itself or `GaussNewton`.
        update: the update rule whose fixed point θ is, where that is no gradient step, such as `Proximal`:
            then (I − ∂_θΦ)ᵀ x = ∇_θ C2 is solved, which is not symmetric, and ‖θ − Φ(θ)‖ is the distance from
            it. A rule without a state of its own.
        warm_start: begin each solve with the x of the last estimate, which the state carries on.

    Raises:
        DifferenceError: if a finite difference is not accurate enough.
        SolveError: if the solve failed, with the reason, the step and the true residual.
        InnerNotConvergedError: away from the optimum, if ``strict``.

    Warns:
        InnerNotConvergedWarning: away from the optimum. SolveWarning: with ``on_failure="warn"``.
    """

    solver: Solver = field(default_factory=CG)
    damping: float = 0.0
    tolerance: float = 1e-3
    strict: bool = False
    on_failure: Literal["raise", "warn"] = "raise"
    mixed: FiniteDifference | None = None
    curvature: GaussNewton | None = None
    update: Any = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise ArgumentError(f"Implicit: solver = {self.solver!r}; it is a solver such as hg.CG()")
        if not (is_number(self.damping) and self.damping >= 0):
            raise ArgumentError(f"Implicit: damping = {self.damping!r}; it is a number ≥ 0")
        if not (is_number(self.tolerance) and self.tolerance > 0):
            raise ArgumentError(f"Implicit: tolerance = {self.tolerance!r}; it is a positive number")
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

    @property
    def training_steps(self) -> int:
        """None: θ stays where it is."""
        return 0

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params)

    def _estimate(
        self, backend: Backend, problem: Bilevel, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate:
        batches = every_batch("train", train, state.step)
        z, rule = inner_state(state), None if self.update is None else as_update_rule(self.update)
        if rule is not None and backend.flatten(rule.init(backend, z.params))[0]:
            raise ArgumentError(
                f"Implicit: update = {self.update!r} carries a state, of which a fixed point knows nothing: "
                "give the rule without momentum, whose fixed points are the same"
            )
        if self.mixed is None:
            at = exact(backend, problem, z, hparams, batches, rule)
        else:
            at = by_differences(backend, problem, z, hparams, batches, self.mixed)
        seen = observe(backend, at.value, at.residual, (), state.step)
        batch = one_batch("val", val, state.step)
        validation = validate(backend, problem, z.params, hparams, batch, z.aux)
        curved = at.product
        if self.curvature is not None:
            curved = self.curvature.products(backend, z.params, hparams, batches)

        def product(p: Tree, k: Any) -> Tree:
            return backend.axpy(self.damping, p, curved(p))

        v, symmetric = validation.v, rule is None
        if not self._warm:
            system = System.at_rest(backend, product, v, symmetric)
        elif isinstance(self.solver, Amortised):
            system = System(product, v, self._start(backend, state), v, symmetric)
        else:
            system = System.begun(backend, product, v, self._start(backend, state), symmetric)
        solution = self.solver.solve(backend, system)
        # One pull-back along x gives (∂_θ G)ᵀ x and (∂_λ G)ᵀ x together.
        hx, mixed, error = at.both(solution.x)
        hx = backend.axpy(self.damping, solution.x, hx if self.curvature is None else curved(solution.x))
        r = vectors.subtract(backend, backend.detach(v), backend.detach(hx))
        x = backend.detach(solution.x)
        solution = judged(backend, self.solver, system, solution, r)
        if self._warm:
            state = state._replace(memory=Warm(self.solver.remembered(backend, x, r)))
        return assemble(
            backend,
            validation,
            vectors.scale(backend, -1.0, mixed),
            at.responds(),
            seen,
            state,
            None if self.allow_unused else inner_reaches(backend, problem, z, hparams, lambda: batches[0]),
            difference_error=error,
            **at.spent(solution.products),
            residual=backend.detach(solution.residual),
            iterations=solution.iterations,
            curvature=backend.detach(solution.curvature),
            failure=solution.failure,
        )

    @property
    def _warm(self) -> bool:
        return self.warm_start or isinstance(self.solver, Amortised)

    def _memory(self, backend: Backend, state: State, hparams: Tree) -> Tree:
        return Warm(backend.zeros(state.params)) if self._warm else state.memory

    @staticmethod
    def _start(backend: Backend, state: State) -> Tree:
        """The last x; zeros if the state is another estimator's."""
        return state.memory.x if isinstance(state.memory, Warm) else backend.zeros(state.params)

    def _check(self, backend: Backend, out: Estimate) -> None:
        if self.mixed is not None:
            self.mixed.check(out.report.difference_error)
        failure = Failure(int(out.report.failure))
        if failure is not Failure.NONE:
            message = self._explain(failure, out)
            if self.on_failure == "raise":
                raise SolveError(message, failure, int(out.report.iterations), float(out.report.residual))
            warnings.warn(message, SolveWarning, stacklevel=4)
        away = float(out.report.inner_gradient_norm)
        if away > self.tolerance:
            if self.strict:
                raise InnerNotConvergedError(away, self.tolerance)
            warnings.warn(not_converged(away, self.tolerance), InnerNotConvergedWarning, stacklevel=4)

    def _sound(self, backend: Backend, out: Estimate) -> Any:
        report = out.report
        sound = self.mixed is None or self.mixed.accepts(report.difference_error)
        if self.on_failure == "raise":
            sound = (report.failure == Failure.NONE) & sound
        return (report.inner_gradient_norm <= self.tolerance) & sound if self.strict else sound

    def _explain(self, failure: Failure, out: Estimate) -> str:
        report, name = out.report, type(self.solver).__name__
        steps, relative = int(report.iterations), float(report.residual)
        slope, curvature = float(report.inner_gradient_norm), float(report.curvature)
        far = (
            f"the parameters are far from the inner optimum (‖∇C̃1‖ = {slope:.1e}): train longer, or use "
            "Unrolled"
        )
        conditioned = "the Hessian is ill-conditioned: set damping > 0"
        accept = 'accept the bias with on_failure="warn"'
        bias = "The hypergradient would carry an error of that order."
        match failure:
            case Failure.SINGULAR:
                return explain(
                    f"the Hessian is singular: {name} met a direction without curvature after {steps} steps, "
                    f"at relative residual {relative:.1e}",
                    "H x = v has no solution, and the hypergradient is not defined by it.",
                    ("a parameter is free: set damping > 0, or give it a penalty", far, accept),
                )
            case Failure.NEGATIVE_CURVATURE:
                return explain(
                    f"the Hessian is not positive definite: {name} met negative curvature at step {steps}",
                    "θ is no minimum of C̃1, so the implicit function theorem does not hold there.",
                    (far, f"set damping > 0 to make H + δI definite (‖H‖ ≈ {curvature:.1e})", accept),
                )
            case Failure.DIVERGED:
                return explain(
                    f"the series of {name} diverged after {steps} terms, at relative residual {relative:.1e}",
                    bias,
                    (
                        f"the step is too large: step_size < {2 / curvature:.1e} is stable here",
                        "the Hessian is not positive definite: set damping > 0, or train longer",
                        accept,
                    ),
                )
            case Failure.BREAKDOWN:
                return explain(
                    f"{name} broke down after {steps} steps, at relative residual {relative:.1e}",
                    bias,
                    ("take hg.GMRES, which does not", conditioned, accept),
                )
            case _:
                return explain(
                    f"the inverse-Hessian solve stopped at relative residual {relative:.1e} > rtol "
                    f"{self.solver.rtol or self.solver.atol:.1e} after {steps} steps of {name}",
                    bias,
                    (far, conditioned, f"too few steps: raise max_steps, or {accept}"),
                )
