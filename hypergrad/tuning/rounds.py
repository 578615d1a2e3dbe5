"""Rounds: each is some plain training steps and then an update of λ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.backend.loops import Loops
from hypergrad.errors import HypergradError
from hypergrad.problems.batches import Read, reading
from hypergrad.problems.step import Observation
from hypergrad.tuning.history import History, Row, namespace
from hypergrad.tuning.interrupts import Ended
from hypergrad.tuning.programs import Programs, without_state
from hypergrad.tuning.progress import Advance, silent
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.state import Step, TunerState
from hypergrad.tuning.steps import Steps


class Part(NamedTuple):
    """``rounds`` rounds of ``plain`` plain steps and an update, and then ``tail`` plain steps."""

    plain: int
    rounds: int
    tail: int


def plan(recipe: Recipe, since: int, steps: int) -> list[Part]:
    """Plan ``steps`` training steps, if ``since`` plain steps of a round have been taken already.

    An unroll that has begun is completed, even if that takes more than ``steps``.
    """
    parts, left = [], max(recipe.plain_steps - since, 0)
    if since and steps > left:
        # The rest of the round that has begun.
        parts.append(Part(left, 1, 0))
        steps, since = steps - left - recipe.closing_steps, 0
    if since:
        return [Part(0, 0, steps)] if steps > 0 else []
    rounds, tail = divmod(max(steps, 0), recipe.period)
    if tail > recipe.plain_steps:
        rounds, tail = rounds + 1, 0
    return parts + ([Part(recipe.plain_steps, rounds, tail)] if rounds or tail else [])


class Outcome(NamedTuple):
    """What one part of a run recorded; ``None`` where there were no such steps.

    Attributes:
        rounds: for each round its row, the losses of its plain steps, and those of its update.
        tail: the losses of the plain steps after the rounds.
        last: the last step.
    """

    rounds: tuple[Row, Tree | None, Any] | None
    tail: Tree | None
    last: Step

    def add_to(self, backend: Backend, history: History, plain: int, closing: int) -> History:
        """Return the history with these rounds, of ``plain`` steps and then ``closing`` with the update."""
        if self.rounds is not None:
            rows, values, losses = backend.collect(self.rounds)
            count, done = len(losses), len(history.inner_values)
            steps = done + (plain + closing) * np.arange(1, count + 1)
            losses = losses.reshape(count, closing)
            if plain:
                losses = namespace(losses).concatenate([values, losses], 1)
            history = history.with_updates(rows, steps).with_losses(losses.reshape(-1))
        return history if self.tail is None else history.with_losses(backend.collect(self.tail))


def run_part(
    recipe: Recipe,
    backend: Backend,
    part: Part,
    programs: Programs | None,
    poll: Callable[[], None] | None,
    advance: Advance,
    read_train: Read | None,
    read_val: Read | None,
    state: TunerState,
    train_data: Tree,
    val_data: Tree,
) -> tuple[TunerState, Outcome]:
    """Run one part of a run.

    With ``programs`` it is a loop in Python, because its batches come from an iterator, and each step is a
    separate program. Without, it may be compiled as a whole. A loop in Python calls ``poll`` before each
    round, which may end it.
    """
    train, val = reading(train_data, read_train), reading(val_data, read_val)
    steps = Steps(recipe, backend, programs)
    loops: Loops = backend.loops if programs is None else Loops(backend)
    loops_in_python = programs is not None or not backend.compiles

    def show(count: int, *losses: Scalar) -> None:
        if advance is not silent:
            loops.callback(partial(_show, advance, count), *losses)

    def train_for(state: TunerState, count: int) -> tuple[TunerState, Observation, Tree | None]:
        def body(
            carry: tuple[TunerState, Observation], k: Any, _: Any
        ) -> tuple[tuple[TunerState, Observation], Scalar]:
            state, observed = carry
            state, step = steps.train(state, train)
            show(1)
            return (state, observed.then(backend, step.observed)), step.inner_value

        nothing = Observation.none(backend, state.inner.params)
        if count == 0:
            return state, nothing, None
        (state, observed), values = loops.scan(body, (state, nothing), count)
        return state, observed, backend.collect(values)

    done, latest = list[Tree](), dict[str, Any]()  # in Python: for an error in a later round

    def one_round(state: TunerState, k: Any) -> tuple[TunerState, Tree, Step, Any]:
        if poll is not None:
            poll()
        state, before, values = train_for(state, part.plain)
        state, step = steps.update(state, train, val)
        out = step.estimate
        assert out is not None
        show(recipe.closing_steps, step.inner_value, out.outer_value)
        row = recipe.row(backend, step, recipe.plain_steps + recipe.training_gradients(step))
        sound = recipe.allows(backend, out, step.observed)
        last = step._replace(observed=before.then(backend, step.observed), estimate=without_state(out))
        rows = row, values, step.inner_values
        if loops_in_python:
            done.append(rows)
            latest.update(state=state, last=last)
        return state, rows, last, sound

    nothing = Observation.none(backend, state.inner.params)
    rows, sound = None, True
    last = Step(nothing, part.tail, False, None, 0, recipe.hparams(backend, state.free))
    if part.rounds:
        try:
            state, rows, last, _ = loops.repeat(one_round, state, part.rounds)
        except (HypergradError, Ended) as error:
            if done:
                error.run = latest["state"], Outcome(backend.collect(done), None, latest["last"])
            raise
        rows = backend.collect(rows)
        assert last.estimate is not None
        sound = recipe.allows(backend, last.estimate, last.observed)
    state, observed, values = train_for(state, part.tail)
    if part.tail:
        # After a fault the steps of the tail are meaningless: ignore their faults.
        later = observed._replace(bad_step=backend.xp.where(sound, observed.bad_step, -1))
        last = last._replace(observed=last.observed.then(backend, later))
    return state, Outcome(rows, values, last)


def _show(advance: Advance, count: int, *losses: Scalar) -> None:
    advance(count, "  ".join(f"{name} {float(x):.3f}" for name, x in zip(("T1", "T2"), losses, strict=False)))
