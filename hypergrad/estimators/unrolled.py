"""Reverse-mode differentiation of training itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import or_
from typing import Any, final

from hypergrad.backend import Backend, Pullback, Tree, vectors
from hypergrad.errors import ArgumentError, FixedPointError
from hypergrad.estimators.assembly import (
    assemble,
    check_start,
    inner_state,
    start_map,
    state_after,
    used_by_inner,
)
from hypergrad.estimators.base import Estimate, HypergradientEstimator, State
from hypergrad.estimators.report import TapeReport
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches, batch_series, one_batch, until_it_ends
from hypergrad.problems.condition import Spent
from hypergrad.problems.step import Inner, Training
from hypergrad.tapes import Full, Tape, Trajectory
from hypergrad.tapes.reversible.tape import LOG_IS_FULL
from hypergrad.updates import Updates, as_update_rule


@final
@dataclass(frozen=True)
class Unrolled(HypergradientEstimator):
    r"""Differentiate through T training steps (Maclaurin et al. 2015; eq. 5 to 7 of Luketina et al.).

        dC2/dλ = ∂_λ C2 + Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) ∇_θ C2(θ_T),    A = ∂Φ/∂z,  B = ∂Φ/∂λ

    Exact for these T steps from this start. With ``truncate=K`` only the last K terms are kept (Shaban et
    al. 2019): exact for K ≥ T, and at a fixed point of gradient descent equal to K Neumann terms of
    `Implicit`; K = 1 is `Greedy`.

    λ may include a learning rate for each step (`hypergrad.Schedule`), a weight for each example (in the
    loss), and with ``start`` the initial parameters, θ_0 = start(λ), which add the term

        (∂θ_0/∂λ)ᵀ A_0ᵀ ⋯ A_{T−1}ᵀ ∇_θ C2(θ_T)                     (Finn et al. 2017, if θ_0 is λ itself)

    What a loss detaches is a constant here, as to every derivative, and moves with λ in training: for such a
    C̃1 and T > 1 the estimate is exact for the function as written, and not for the training
    (`hypergrad.check_hypergradient` tells).

    Cost: about 3 T gradients with the tape `Full` and 4 T with `States`; the tape determines the memory. With
    truncation the first T − K steps cost one gradient each and store nothing.

    Args:
        update: the update rule that trains θ.
        steps: T, or ``None`` for one step per batch: to the end of a list or an iterator, or until a function
            t -> batch raises `StopIteration`.
        truncate: K, or ``None`` for all terms.
        tape: how the run is recorded for the backward pass.
        start: a function λ ↦ θ_0. Every estimate then starts there, with a fresh optimiser: its state
            and the step that bias corrections and schedules count begin again. Functions t -> batch do not.
    """

    update: Updates
    steps: int | None
    truncate: int | None = None
    tape: Tape = field(default_factory=Full)
    start: Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        as_update_rule(self.update)
        for name, value in (("steps", self.steps), ("truncate", self.truncate)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"Unrolled: {name} = {value!r}; it must be a positive integer")
        check_start("Unrolled", self.start)
        if not isinstance(self.tape, Tape):
            raise ArgumentError(f"Unrolled: tape = {self.tape!r}; it must be a tape such as hg.Full()")

    @property
    def is_exact(self) -> bool:
        return self.truncate is None and self.start is None

    @property
    def training_steps(self) -> int:
        """T.

        Raises:
            ArgumentError: if ``steps`` is ``None``.
        """
        if self.steps is None:
            raise ArgumentError("Unrolled(steps=None) trains until the batches end: set steps")
        return self.steps

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params, as_update_rule(self.update).init(backend, params))

    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate[Any]:
        path = self._path(Training(backend, problem, as_update_rule(self.update)), state, train)
        begin, pull_start = self._begin(backend, state, hparams)
        path.training.check_differentiable(begin, hparams, path.start)
        skipped = 0 if self.truncate is None or path.length is None else max(path.length - self.truncate, 0)
        z, before = path.part(0, skipped).run(begin, hparams)
        recording = self.tape.record(
            path if path.length is None else path.part(skipped, path.length - skipped), z, hparams
        )
        end, final = state.step + skipped + recording.length, recording.z
        validation = problem.validation(backend, final.params, hparams, one_batch("val", val, end), final.aux)
        # Keep no reference to v, so that the tape can free it.
        v, validation = [validation.v], validation._replace(v=None)
        pulled = recording.pull(Inner(v.pop(), backend.zeros(final.opt_state), backend.zeros(final.aux)))
        if pull_start is not None and skipped == 0:
            (term,) = pull_start(pulled.start)
            pulled = pulled._replace(
                hparams=vectors.add(backend, pulled.hparams, term),
                reached=backend.map(or_, pulled.reached, pull_start.reached[0]),
            )
        first = used_by_inner(backend, problem, begin, hparams, lambda: path.batch(0))
        # A hyperparameter of the start counts as used, even if truncation drops its term.
        used = first if pull_start is None else lambda: backend.map(or_, first(), pull_start.reached[0])
        observed = before.joined(backend, recording.observed)
        if self.start is not None:
            observed = observed.numbered_from(backend, state.step)
        return assemble(
            backend,
            validation,
            pulled.hparams,
            pulled.reached,
            observed,
            state_after(state, final, end),
            Spent(skipped + recording.gradients + 1, recording.products, recording.bytes_held),
            None if self.allow_unused else used,
            tape=TapeReport(pulled.fault),
        )

    def _check(self, backend: Backend, out: Estimate[Any]) -> None:
        if (fault := int(_tape(out).fault)) != -1:
            path = None if fault < 0 else backend.paths(out.state.params, "params")[fault]
            raise FixedPointError(path, log=fault == LOG_IS_FULL)

    def _sound(self, backend: Backend, out: Estimate[Any]) -> Any:
        return _tape(out).fault == -1

    def _begin(self, backend: Backend, state: State, hparams: Tree) -> tuple[Inner, Pullback | None]:
        """Return z_0, and the pull-back from it to the hyperparameters if ``start`` made it."""
        if self.start is None:
            return inner_state(state), None
        z, pull_start = backend.pullback(
            start_map(backend, self.start, as_update_rule(self.update), state), hparams
        )
        return z, pull_start

    def _path(self, training: Training, state: State, train: Batches) -> Trajectory:
        """Return the steps to take: as many as there are batches if ``steps`` is ``None``."""
        backend, steps, to_start = training.backend, self.steps, self.start is not None
        first = 0 if to_start else state.step  # for the optimiser, which a start renews
        if steps is None:
            train, steps = until_it_ends(
                backend, "train", train, state.step, self.tape.open_ended and self.truncate is None
            )
        if steps is None:
            return Trajectory(training, train, first, None, to_start)
        batch = batch_series(backend, "train", train, state.step, steps)
        return Trajectory(training, batch, first, steps, to_start)


def _tape(out: Estimate[Any]) -> TapeReport:
    assert out.report.tape is not None
    return out.report.tape
