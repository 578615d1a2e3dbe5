"""Single steps: read the batches, run a program, and check for faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from hypergrad.backend import Backend
from hypergrad.errors import ArgumentError
from hypergrad.estimators.assembly import inner_state, state_after
from hypergrad.problems.batches import Batches, BatchList, Read, is_loader, one_batch, single, stream, window
from hypergrad.tuning.programs import (
    Program,
    Programs,
    train_step,
    tune_step,
    update_step,
    with_state,
    without_state,
)
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.state import Step, TunerState


@final
@dataclass(frozen=True)
class Steps:
    """The steps of a recipe, each a separate program; without ``programs``, parts of a larger program."""

    recipe: Recipe
    backend: Backend
    programs: Programs | None = None

    def train(self, state: TunerState, train: Batches) -> tuple[TunerState, Step]:
        """Take one training step; T2 is not read."""
        inner, lam = state.inner, self.recipe.hparams(self.backend, state.free)
        batch = one_batch("train", train, inner.step)
        z, observed = self._program(train_step)(inner_state(inner), lam, batch, inner.step)
        new = state._replace(inner=state_after(inner, z, inner.step + 1), since=state.since + 1)
        return self._checked(new, Step(observed, 1, False, None, 0, lam))

    def update(self, state: TunerState, train: Batches, val: Batches) -> tuple[TunerState, Step]:
        """Make an estimate with its training steps, and update λ."""
        backend, estimator, count = self.backend, self.recipe.estimator, self.recipe.closing_steps
        start = (state.start if self.recipe.restart else state.inner).step
        if callable(train) and self._compiles:
            # Programs are cached by their functions, and this one may be new in every step: call it here.
            train = BatchList(train(start + k) for k in range(count))
        data: Any
        read: Read | None
        if estimator.resamples:
            # The estimate also reads batches other than those of its own steps.
            data, read = stream(backend, "train", train)
        elif count == 1:
            data, read = single(one_batch("train", train, start))
        else:
            data, read = window(backend, "train", train, start, count)
        batch = one_batch("val", val, state.updates)
        new, step = self._program(update_step, read)(state._replace(since=0), data, batch)
        # The counters are known without waiting for the program.
        new = new._replace(inner=new.inner._replace(step=start + count), since=0, updates=state.updates + 1)
        return self._checked(new, step._replace(trained=count, updated=True))

    def tune(self, state: TunerState, train: Batches, val: Batches) -> tuple[TunerState, Step]:
        """Make an estimate at the present θ, and update λ; do not train."""
        self.recipe.check_can_tune()
        backend, t = self.backend, state.inner.step
        data: Any = None
        read: Read | None = None
        if isinstance(train, list) and train:
            data = train
        elif self.recipe.estimator.resamples and not (callable(train) and self._compiles):
            data, read = stream(backend, "train", train)
        else:
            data, read = single(one_batch("train", train, t))
        batch = one_batch("val", val, state.updates)
        new, step = self._program(tune_step, read)(state._replace(since=0), data, batch)
        inner = state.inner._replace(memory=new.inner.memory)
        new = new._replace(inner=inner, since=0, updates=state.updates + 1)
        return self._checked(new, step._replace(trained=0, updated=True))

    def train_or_update(self, state: TunerState, train: Batches, val: Batches) -> tuple[TunerState, Step]:
        """Take a training step or update λ, where only the running program can tell which is due."""
        if is_loader(train) or is_loader(val):
            raise ArgumentError(
                "Tuner.step: a compiled program cannot draw a new batch from an iterator or a loader at each "
                "call: draw it outside, and pass it as an argument"
            )

        def update() -> tuple[TunerState, Step]:
            new, step = self.update(state, train, val)
            assert step.estimate is not None
            return new, step._replace(estimate=without_state(step.estimate))

        due = state.since >= self.recipe.plain_steps
        new, step = self.backend.cond(due, update, lambda: self.train(state, train))
        return new, with_state(new, step)

    @property
    def _compiles(self) -> bool:
        return self.programs is not None and self.backend.compiles

    def _program(self, f: Callable[..., Any], *given: Any) -> Program:
        if self.programs is None:
            return partial(f, self.recipe, self.backend, *given)
        return self.programs(self.backend, f, *given)

    def _checked(self, state: TunerState, step: Step) -> tuple[TunerState, Step]:
        """Raise the faults of a step, as far as they can be read."""
        step = with_state(state, step)
        estimate = step.estimate
        if self.backend.readable(*step.observed) and (estimate is None or estimate.readable(self.backend)):
            # Without a compiler the estimate was already checked when it was made, warnings included.
            unchecked = step if self.backend.compiles else step._replace(updated=False)
            self.recipe.check(self.backend, state.inner.params, unchecked)
        return state, step
