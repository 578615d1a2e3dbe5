"""Hypergradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from hypergrad.backend import Backend, Tree, find_backend, vectors
from hypergrad.errors import (
    ArgumentError,
    Failure,
    InnerNotConvergedError,
    InnerNotConvergedWarning,
    SolveError,
    SolveWarning,
    not_converged,
    warn,
)
from hypergrad.estimators.adjoint import solve_adjoint
from hypergrad.estimators.assembly import assemble, inner_state, used_by_inner
from hypergrad.estimators.assumptions import Checks
from hypergrad.estimators.base import Estimate, HypergradientEstimator, State
from hypergrad.estimators.report import Report, SolveReport
from hypergrad.problems import Problem
from hypergrad.problems.batches import Batches, every_batch, is_loader, one_batch, reading, stream
from hypergrad.problems.step import Inner, Observation, observe
from hypergrad.second_order import Exact, Products
from hypergrad.solvers import CG, Solver, Warm
from hypergrad.solvers.diagnosis import diagnosis
from hypergrad.solvers.solve import check_symmetry


@final
@dataclass(frozen=True)
class Implicit(HypergradientEstimator):
    r"""The implicit function theorem with an inexact inverse-Hessian product (Foo et al. 2008, eq. 4 of
    Luketina et al. 2016; Lorraine et al. 2020).

        dC2/dλ = ∂_λ C2 − (∂²_λθ C̃1)ᵀ x,    H x = ∇_θ C2,    H = ∂²_θθ C̃1

    where C̃1 is the training loss and C2 the validation loss.

    Exact if θ solves the inner problem and the linear solve is exact; otherwise the error is of first order
    in both residuals (Pedregosa 2016, theorem 1), see `hypergrad.error_bound`. Does not train: θ is not
    updated.

    Cost: 2 gradients and K + 1 products, where K is the number of products that the solver takes. The graph
    of the gradient is kept, and each product is one pull-back through it. The last one gives the mixed term
    and, in the same pass, the true residual Hx − v, so the solver's own residual need not be trusted.
    Memory: one training graph for each batch.

    The estimate can be differentiated with respect to anything the losses depend on, at fixed θ. Each
    derivative takes another solve by the same solver; only a truncated solver is differentiated through its
    iterations. If the solve for a derivative fails, that derivative is NaN.

    Args:
        solver: solves H x = ∇_θ C2: `CG` or another solver, possibly wrapped, as in
            ``hg.Warm(hg.Damped(hg.CG(), 1e-3))``. Its memory is kept in the state.
        products: how products with H and ∂²_λθ C̃1 are computed: `Exact`, `FiniteDifference` for losses
            without second derivatives, or `GaussNewton` to approximate H.
        checks: what to do if θ is away from an optimum, or if the solve failed.

    Raises:
        DifferenceError: if a finite difference is not accurate enough.
        SolveError: if the solve failed, with the reason, the step and the true residual.
        InnerNotConvergedError: if θ is away from the optimum and ``checks.away`` is ``"raise"``.

    Warns:
        InnerNotConvergedWarning: if θ is away from the optimum.
        SolveWarning: if the solve failed and ``checks.unsolved`` is ``"warn"``.
    """

    by_hand: ClassVar[bool] = True
    at_saddles: ClassVar[bool] = True

    solver: Solver = field(default_factory=CG)
    products: Products = field(default_factory=Exact)
    checks: Checks = field(default_factory=Checks)

    def __post_init__(self) -> None:
        for name, kind, example in (
            ("solver", Solver, "hg.CG()"),
            ("products", Products, "hg.Exact()"),
            ("checks", Checks, "hg.Checks()"),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise ArgumentError(
                    f"Implicit: {name} = {value!r}; it must be an hg.{kind.__name__}, such as {example}"
                )

    @property
    def training_steps(self) -> int:
        """0: θ is not updated."""
        return 0

    @property
    def resamples(self) -> bool:
        return self.solver.resamples

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params)

    def _memory(self, backend: Backend, state: State, hparams: Tree) -> Tree:
        return self.solver.init(backend, state.params)

    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate[Any]:
        check_symmetry(self.solver, problem.symmetric)
        z, t, batches = inner_state(state), state.step, every_batch("train", train, state.step)
        if not self.solver.differentiable:
            z, hparams = backend.nondifferentiable((z, hparams), type(self.solver.core).__name__)
        condition = self.products.of(backend, problem, z, hparams, batches)
        observed = Observation(condition.value, float("nan"))
        if condition.residual is not None:
            observed = observe(backend, condition.value, condition.residual, None, t)
        elif self.checks.away == "raise":
            raise ArgumentError('Implicit: Checks(away="raise") needs ‖∇C̃1‖: give Derivatives(inner_grad=…)')
        validation = problem.validation(backend, z.params, hparams, one_batch("val", val, t), z.aux)
        resampled = self._resampled(backend, problem, z, hparams, train, t) if self.resamples else None
        solution, image = solve_adjoint(
            backend, problem, condition, validation, self.solver, state.memory, resampled
        )
        spent = condition.spent(solution.products)
        if self.resamples:
            spent = spent._replace(gradients=spent.gradients + solution.products)
        return assemble(
            backend,
            validation,
            vectors.scale(backend, -1.0, image.mixed),
            condition.reached(),
            observed,
            state._replace(memory=solution.memory),
            spent,
            None if self.allow_unused else used_by_inner(backend, problem, z, hparams, lambda: batches[0]),
            solve=SolveReport.of(solution),
            difference_error=image.error,
        )

    def _resampled(
        self, backend: Backend, problem: Problem, z: Inner, hparams: Tree, train: Batches, step: Any
    ) -> Callable[[Tree, Any], Tree]:
        """Return (p, k) -> H_k p, where H_k is the Hessian on the k-th batch from this step on."""
        if is_loader(train) and backend.compiles:
            raise ArgumentError(
                "Implicit: in a compiled program, a solver with fresh=True needs its batches as a list or a "
                "function t -> batch, not as an iterator or a loader"
            )
        batches = reading(*stream(backend, "train", train))

        def product(p: Tree, k: Any) -> Tree:
            batch = one_batch("train", batches, step + k)
            return self.products.of(backend, problem, z, hparams, [batch]).product(p)

        return product

    def remarkable(self, columns: dict[str, Any]) -> Any:
        checks = self.checks
        unsolved = (columns["solve.failure"] != Failure.NONE) & (checks.unsolved != "ignore")
        away = (columns["inner_gradient_norm"] > checks.tolerance) & (checks.away != "ignore")
        return (unsolved & (unsolved.cumsum() == 1)) | (away & (away.cumsum() == 1))

    def check_report(self, backend: Backend, report: Report) -> None:
        solve, checks = report.solve, self.checks
        assert solve is not None
        self.products.check(report.difference_error)
        failure = Failure(int(backend.to_numpy(solve.failure)))
        gradient_norm = float(backend.to_numpy(report.inner_gradient_norm))
        if failure is not Failure.NONE and checks.unsolved != "ignore":
            iterations, residual = int(solve.iterations), float(solve.residual)
            message = diagnosis(
                failure, self.solver, iterations, residual, gradient_norm, float(solve.curvature)
            )
            if checks.unsolved == "raise":
                raise SolveError(message, failure, iterations, residual)
            warn(message, SolveWarning)
        if checks.away != "ignore" and gradient_norm > checks.tolerance:
            if checks.away == "raise":
                raise InnerNotConvergedError(gradient_norm, checks.tolerance)
            message = not_converged(gradient_norm, checks.tolerance)
            warn(message, InnerNotConvergedWarning)

    def _sound(self, backend: Backend, out: Estimate[Any]) -> Any:
        report, solve, checks = out.report, out.report.solve, self.checks
        assert solve is not None
        sound = self.products.accepts(report.difference_error)
        if checks.unsolved == "raise":
            sound = (solve.failure == Failure.NONE) & sound
        if checks.away == "raise":
            sound = (report.inner_gradient_norm <= checks.tolerance) & sound
        return sound


def adjoint(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    train: Batches,
    val: Batches,
    solver: Solver | None = None,
    *,
    aux: Tree = None,
    backend: Backend | str | None = None,
) -> Tree:
    """Return the adjoint x, a tree like the parameters that solves (∂_θ G)ᵀ x = ∂_θ C2.

    G is ∇_θ C̃1, or the residual of a fixed point. Use x for the level above a bilevel problem
    (`hypergrad.Level`), or to inspect it. It is a constant: no derivative passes through it.

    ``solver`` is `CG` with ``rtol=1e-10`` by default.

    Where values cannot be read, as in a compiled program, a failed solve gives NaN: `hypergrad.solve` says
    why.

    Raises:
        Any error of `Implicit`.
    """
    solver = CG(rtol=1e-10) if solver is None else solver
    implicit = Implicit(solver if isinstance(solver, Warm) else Warm(solver), allow_unused=True)
    backend = find_backend(params, hparams, backend=backend)
    params, hparams = backend.nondifferentiable((params, hparams), "hg.adjoint")
    state = implicit.init(problem, params, hparams, aux=aux, backend=backend)
    out = implicit.estimate(problem, state, hparams, train, val, backend=backend)
    return implicit.withheld(backend, out, out.state.memory.x)
