"""T1−T2: the hypergradient of one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

from hypergrad import vectors
from hypergrad.backend import Backend, Tree
from hypergrad.batches import Batches, one_batch
from hypergrad.errors import ArgumentError
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
from hypergrad.training import Seen, Training, inner_gradient, observe
from hypergrad.updates import as_update_rule


@final
@dataclass(frozen=True)
class Greedy(HypergradientEstimator):
    r"""T1−T2: keep the last term of the sum (Luketina et al. 2016, eq. 3).

        dC2/dλ ≈ ∂_λ C2 + B_tᵀ ∇_θ C2(θ_{t+1}),    B_t = ∂Φ/∂λ at step t

    Trains one step and asks how λ should have been for that step to help T2. Exact for one step of
    training and blind to all steps before; for plain gradient descent B_t = −η ∂²_λθ C̃1, so it is the
    implicit hypergradient with H⁻¹ ≈ η I. Parameters, hyperparameters and the update rule's own rates
    may all be tuned by it.

    Cost: 2 gradients and one product of the training graph, which is the graph of the training gradient
    itself and is not built twice. Where λ enters only through a penalty the product never touches the
    data, and costs O(|θ|). Memory: one training graph.

    Args:
        update: the update rule that trains θ.
        response: ``"update"`` differentiates through the optimiser's actual step. ``"gradient"`` is
            eq. 3 to the letter, −(∂²_λθ C̃1)ᵀ ∇_θ C2: no learning rate and no preconditioner, whatever
            the optimiser.
        lookahead: take ∇_θ C2 at θ_{t+1}, as the paper says; ``False`` takes it at θ_t, as its authors'
            code did, so that T1 and T2 could share one pass.
    """

    update: Any
    response: Literal["update", "gradient"] = "update"
    lookahead: bool = True

    def __post_init__(self) -> None:
        as_update_rule(self.update)
        if self.response not in ("update", "gradient"):
            raise ArgumentError(f"Greedy: response = {self.response!r}; it is 'update' or 'gradient'")

    @property
    def training_steps(self) -> int:
        """One."""
        return 1

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params, as_update_rule(self.update).init(backend, params))

    def _estimate(
        self, backend: Backend, problem: Bilevel, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate:
        phi = Training(backend, problem, as_update_rule(self.update))
        z, t = inner_state(state), state.step
        batch = one_batch("train", train, t)

        def step(hparams: Tree) -> tuple[Tree, tuple[Tree, Seen]]:
            (params, opt_state), seen = phi.step(z, hparams, batch, t)
            return params, (opt_state, seen)

        def gradient(hparams: Tree) -> tuple[Tree, Seen]:
            value, gradient = inner_gradient(backend, problem, z.params, hparams, batch)
            return gradient, observe(backend, value, gradient, (), t)

        if self.response == "update":
            params, pullback, (opt_state, seen) = backend.vjp(step, hparams, has_aux=True)
        else:
            g, pullback, seen = backend.vjp(gradient, hparams, has_aux=True)
            params, opt_state = phi.apply(g, z, hparams, t)

        at = params if self.lookahead else z.params
        validation = validate(backend, problem, at, hparams, one_batch("val", val, t))
        v = validation.v if self.response == "update" else vectors.scale(backend, -1.0, validation.v)
        (response,) = pullback(v)
        return assemble(
            backend,
            validation,
            response,
            pullback.reached[0],
            seen,
            State(params, opt_state, t + 1, state.memory),
            None if self.allow_unused else inner_reaches(backend, problem, z.params, hparams, lambda: batch),
            gradients=2,
            products=1,
            bytes_held=pullback.nbytes,
        )
