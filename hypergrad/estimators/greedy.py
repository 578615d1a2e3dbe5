"""T1−T2: the hypergradient of one training step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.estimators.assembly import assemble, inner_state, state_after, used_by_inner
from hypergrad.estimators.base import Estimate, HypergradientEstimator, State
from hypergrad.estimators.report import Report
from hypergrad.problems import Problem
from hypergrad.problems.batches import Batches, one_batch
from hypergrad.problems.step import Training
from hypergrad.second_order import Exact, GaussNewton, Products
from hypergrad.updates import Updates, as_update_rule


@final
@dataclass(frozen=True)
class Greedy(HypergradientEstimator):
    r"""T1−T2: keep the last term of the sum (Luketina et al. 2016, eq. 3).

        dC2/dλ ≈ ∂_λ C2 + B_tᵀ ∇_θ C2(θ_{t+1}),    B_t = ∂Φ/∂λ at step t

    where Φ is one training step on the training loss C̃1 (data T1), and C2 the validation loss (data T2).

    Takes one training step, then differentiates C2 after it with respect to the λ used in that step. Exact
    for one step of training; ignores all earlier steps. For plain gradient descent B_t = −η ∂²_λθ C̃1, so it
    is the implicit hypergradient with H⁻¹ ≈ η I. λ may include hyperparameters of the losses and of the
    update rule, such as its learning rate.

    Cost: 2 gradients and one product, a pull-back through the graph of the training gradient, which is built
    only once. Where λ enters only through a penalty, the product never touches the data and costs O(|θ|).
    Memory: one training graph.

    With ``products=FiniteDifference()`` only first-order gradients of the losses are taken: 4 more of them
    replace the product.

    Args:
        update: the update rule that trains θ.
        response: ``"update"`` differentiates through the optimiser's actual step. ``"gradient"`` is
            eq. 3 to the letter, −(∂²_λθ C̃1)ᵀ ∇_θ C2: no learning rate and no preconditioner, whatever
            the optimiser.
        lookahead: take ∇_θ C2 at θ_{t+1}, as in the paper; ``False`` takes it at θ_t, as in its authors'
            code, so that T1 and T2 could share one pass.
        products: how products with ∂²_λθ C̃1 are computed: `Exact`, or `FiniteDifference` for losses without
            second derivatives.

    Raises:
        DifferenceError: if a finite difference is not accurate enough.
    """

    by_hand: ClassVar[bool] = True

    update: Updates
    response: Literal["update", "gradient"] = "update"
    lookahead: bool = True
    products: Products = field(default_factory=Exact)

    def __post_init__(self) -> None:
        as_update_rule(self.update)
        if self.response not in ("update", "gradient"):
            raise ArgumentError(f"Greedy: response = {self.response!r}; it must be 'update' or 'gradient'")
        if not isinstance(self.products, Products) or isinstance(self.products, GaussNewton):
            raise ArgumentError(
                f"Greedy: products = {self.products!r}; it must be hg.Exact() or hg.FiniteDifference()"
            )

    @property
    def training_steps(self) -> int:
        """One step per estimate."""
        return 1

    @property
    def is_exact(self) -> bool:
        return self.response == "update"

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params, as_update_rule(self.update).init(backend, params))

    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate[Any]:
        z, t, batch = inner_state(state), state.step, one_batch("train", train, state.step)
        training = Training(backend, problem, as_update_rule(self.update))
        if self.response == "update":
            training.check_differentiable(z, hparams, t)
        step = self.products.step(training, z, hparams, batch, t, self.response == "update")
        point = step.z if self.lookahead else z
        validation = problem.validation(backend, point.params, hparams, one_batch("val", val, t), point.aux)
        pulled = step.pull(validation.v)
        response = pulled.hparams
        return assemble(
            backend,
            validation,
            response if self.response == "update" else vectors.scale(backend, -1.0, response),
            pulled.reached,
            step.observed,
            state_after(state, step.z, t + 1),
            pulled.spent,
            None if self.allow_unused else used_by_inner(backend, problem, z, hparams, lambda: batch),
            difference_error=pulled.error,
        )

    def check_report(self, backend: Backend, report: Report) -> None:
        self.products.check(report.difference_error)

    def _sound(self, backend: Backend, out: Estimate[Any]) -> Any:
        return self.products.accepts(out.report.difference_error)
