"""Reverse-mode differentiation of training itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from hypergrad.backend import Backend, Tree
from hypergrad.batches import Batches, batch_series, one_batch
from hypergrad.errors import ArgumentError
from hypergrad.estimators.base import (
    Estimate,
    HypergradientEstimator,
    State,
    assemble,
    inner_reaches,
    inner_state,
    state_after,
    validate,
)
from hypergrad.problem import Bilevel
from hypergrad.tapes import Full, Tape
from hypergrad.tapes.base import run
from hypergrad.training import Inner, Seen, Training
from hypergrad.updates import as_update_rule


@final
@dataclass(frozen=True)
class Unrolled(HypergradientEstimator):
    r"""Differentiate through T training steps (Maclaurin et al. 2015; eq. 5 to 7 of Luketina et al.).

        dC2/dλ = ∂_λ C2 + Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) ∇_θ C2(θ_T),    A = ∂Φ/∂z,  B = ∂Φ/∂λ

    Exact for these T steps from this start. With ``truncate=K`` only the last K terms are kept (Shaban et
    al. 2019): exact for K ≥ T, and at a fixed point of gradient descent equal to K Neumann terms of
    `Implicit`; K = 1 is `Greedy`.

    Cost: about 3 T gradients with the tape `Full` and 4 T with `States`; memory is the tape's. With
    truncation the first T − K steps cost one gradient each and hold nothing.

    Args:
        update: the update rule that trains θ.
        steps: T.
        truncate: K, or ``None`` for all terms.
        tape: how the run is remembered.
    """

    update: Any
    steps: int
    truncate: int | None = None
    tape: Tape = field(default_factory=Full)

    def __post_init__(self) -> None:
        as_update_rule(self.update)
        for name, value in (("steps", self.steps), ("truncate", self.truncate)):
            if value is None and name == "truncate":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"Unrolled: {name} = {value!r}; it is a positive integer")
        if not isinstance(self.tape, Tape):
            raise ArgumentError(f"Unrolled: tape = {self.tape!r}; it is a tape such as hg.Full()")

    @property
    def training_steps(self) -> int:
        """T."""
        return self.steps

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params, as_update_rule(self.update).init(backend, params))

    def _estimate(
        self, backend: Backend, problem: Bilevel, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate:
        phi = Training(backend, problem, as_update_rule(self.update))
        batch = batch_series(backend, "train", train, state.step, self.steps)

        def step(z: Inner, hparams: Tree, k: Any) -> tuple[Inner, Seen]:
            return phi.step(z, hparams, batch(k), state.step + k)

        kept = self.steps if self.truncate is None else min(self.truncate, self.steps)
        skipped = self.steps - kept
        z, before = run(backend, step, inner_state(state), hparams, skipped)
        recording = self.tape.record(
            backend, lambda z, hparams, k: step(z, hparams, skipped + k), z, hparams, kept
        )
        end, final = state.step + self.steps, recording.z
        validation = validate(backend, problem, final.params, hparams, one_batch("val", val, end), final.aux)
        response, responds = recording.pull(
            Inner(validation.v, backend.zeros(final.opt_state), backend.zeros(final.aux))
        )
        first = inner_reaches(backend, problem, inner_state(state), hparams, lambda: batch(0))
        return assemble(
            backend,
            validation,
            response,
            responds,
            before.then(backend, recording.seen),
            state_after(state, final, end),
            None if self.allow_unused else first,
            gradients=skipped + recording.gradients + 1,
            products=recording.products,
            bytes_held=recording.bytes_held,
        )
