"""The implicit function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

from hypergrad import vectors
from hypergrad.arguments import is_number
from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.batches import Batches, every_batch, one_batch
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
from hypergrad.solvers import CG, Solver
from hypergrad.solvers.base import residual
from hypergrad.training import Inner, evaluate, inner_gradient, observe, training_loss


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
        look = _exact if self.mixed is None else _by_differences
        z = inner_state(state)
        at = look(self, backend, problem, z, hparams, batches)
        seen = observe(backend, at.value, at.gradient, (), state.step)
        batch = one_batch("val", val, state.step)
        validation = validate(backend, problem, z.params, hparams, batch, z.aux)

        def matvec(p: Tree) -> Tree:
            return backend.axpy(self.damping, p, at.product(p))

        solution = self.solver.solve(backend, matvec, validation.v)
        # H is symmetric, so one pull-back of ∇C̃1 along x gives H x and (∂²_λθ C̃1)ᵀ x together.
        hx, mixed, error = at.both(solution.x)
        hx = backend.axpy(self.damping, solution.x, hx)
        true_residual = residual(backend, backend.detach(hx), backend.detach(validation.v))
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
            residual=true_residual,
            iterations=solution.iterations,
            curvature=backend.detach(solution.curvature),
            failure=self._judge(backend, solution.failure, true_residual),
        )

    def _judge(self, backend: Backend, failure: Scalar, true_residual: Scalar) -> Scalar:
        """A solver that reports success is believed only if the true residual agrees."""
        promised = self.solver.promises()
        if promised is None:
            return failure
        missed = (failure == Failure.NONE) & ~(true_residual <= promised)
        return backend.xp.where(missed, int(Failure.MAX_STEPS), failure)

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
            case _:
                return explain(
                    f"the inverse-Hessian solve stopped at relative residual {relative:.1e} > rtol "
                    f"{self.solver.promises():.1e} after {steps} steps of {name}",
                    bias,
                    (far, conditioned, f"too few steps: raise max_steps, or {accept}"),
                )


class _Linearised(NamedTuple):
    """C̃1 at a point, and products with its second derivatives.

    ``product`` is p -> H p; ``both`` is x -> H x, (∂²_λθ C̃1)ᵀ x, and the estimate of their error.
    """

    value: Scalar
    gradient: Tree
    product: Callable[[Tree], Tree]
    both: Callable[[Tree], tuple[Tree, Tree, Scalar]]
    responds: Callable[[], Tree]
    spent: Callable[[Scalar], dict[str, Any]]


def _exact(
    implicit: Implicit, backend: Backend, problem: Bilevel, z: Inner, hparams: Tree, batches: list[Tree]
) -> _Linearised:
    """One graph of the gradient, pulled back through for each product."""

    def gradient(params: Tree, hparams: Tree) -> tuple[Tree, tuple[Scalar, Tree]]:
        value, g = mean_gradient(backend, problem, z._replace(params=params), hparams, batches)
        return g, (value, g)

    _, pullback, (value, g) = backend.vjp(gradient, z.params, hparams, has_aux=True)

    def spent(products: Scalar) -> dict[str, Any]:
        count = len(batches)
        return {
            "gradients": count + 1,
            "products": count * (products + 1),
            "bytes_held": pullback.nbytes,
        }

    return _Linearised(
        value,
        g,
        pullback.onto(0),
        lambda x: (*pullback(x), float("nan")),
        lambda: pullback.reached[1],
        spent,
    )


def _by_differences(
    implicit: Implicit, backend: Backend, problem: Bilevel, z: Inner, hparams: Tree, batches: list[Tree]
) -> _Linearised:
    """First-order gradients alone, at two points for each product."""
    mixed, draws = implicit.mixed, backend.generator()
    assert mixed is not None

    def losses(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
        values = [training_loss(backend, problem, batch, z.aux)(params, hparams)[0] for batch in batches]
        return sum(values[1:], values[0]) / len(batches), ()

    def slopes(params: Tree) -> Tree:
        with backend.replay(draws):
            value, pullback, _ = backend.vjp(losses, params, hparams, has_aux=True)
        return pullback(backend.xp.ones_like(value))

    value, pullback, _ = evaluate(backend, "inner", losses, batches, z.params, hparams)
    base = pullback(backend.xp.ones_like(value))

    def product(p: Tree) -> Tree:
        return mixed.roughly(backend, lambda theta: slopes(theta)[0], z.params, p, base[0])

    def both(x: Tree) -> tuple[Tree, Tree, Scalar]:
        (hx, slope), error, _ = mixed.along(backend, slopes, z.params, x, base)
        return hx, slope, error

    def spent(products: Scalar) -> dict[str, Any]:
        last = 2 if mixed.estimate_error else 1
        gradients = len(batches) * (1 + mixed.sides * (products + last)) + 1
        return {"gradients": gradients, "products": 0, "bytes_held": 0}

    return _Linearised(value, base[0], product, both, lambda: pullback.reached[1], spent)


def mean_gradient(
    backend: Backend, problem: Bilevel, z: Inner, hparams: Tree, batches: list[Tree]
) -> tuple[Scalar, Tree]:
    """C̃1 and its gradient, averaged over the batches given; the auxiliary state stays as it is."""
    value, gradient, _ = inner_gradient(backend, problem, z, hparams, batches[0])
    for batch in batches[1:]:
        another, g, _ = inner_gradient(backend, problem, z, hparams, batch)
        value, gradient = value + another, vectors.add(backend, gradient, g)
    if len(batches) == 1:
        return value, gradient
    share = 1.0 / len(batches)
    return share * value, vectors.scale(backend, share, gradient)
