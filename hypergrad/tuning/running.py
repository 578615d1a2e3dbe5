"""A run under way: its state and history so far, and what ends it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, final

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import HypergradError
from hypergrad.problems.batches import Batches, is_loader, stream
from hypergrad.problems.step import Observation
from hypergrad.tuning.history import History
from hypergrad.tuning.interrupts import Ended, Interrupts
from hypergrad.tuning.programs import Programs, with_state
from hypergrad.tuning.progress import Advance
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.rounds import Outcome, Part, plan, run_part
from hypergrad.tuning.state import Run, Step, TunerState


@final
class Running:
    """A run under way, which goes on stretch by stretch; `run` is the run so far.

    Where its rounds are a loop in Python, a signal ends it after the round in which it comes, or at once
    while it waits for a batch. A compiled program is waited for.
    """

    def __init__(
        self,
        programs: Programs,
        backend: Backend,
        start: tuple[TunerState, History],
        train: Batches,
        val: Batches,
        interrupts: Interrupts,
    ) -> None:
        self._programs, self._backend, self._interrupts = programs, backend, interrupts
        self._recipe: Recipe = programs.recipe
        # Batches of an iterator cannot become part of a program.
        self._in_python = is_loader(train) or is_loader(val)
        data, reads = zip(*(self._stream("train", train), self._stream("val", val)), strict=True)
        self._data: tuple[Tree, ...] = data
        self._reads = reads
        state, history = start
        nothing = Observation.none(backend, state.inner.params)
        last = Step(nothing, 0, False, None, 0, self._recipe.hparams(backend, state.free))
        self.run = self._run(state, history, last)

    @property
    def done(self) -> int:
        """Training steps so far."""
        return len(self.run.history.inner_values)

    def go_on(self, steps: int, advance: Advance) -> None:
        """Take so many training steps, or a few more to complete an unroll that has begun.

        Raises:
            Ended: if a signal came.
            As `hypergrad.Tuner.run`; the error's ``run`` is the run so far.
        """
        for part in plan(self._recipe, int(self.run.state.since), steps):
            try:
                self._poll()
                self._take(part, advance)
            except (HypergradError, Ended) as error:
                if error.run is not None:
                    state, outcome = error.run
                    self._add(part, state, outcome)
                error.run = self.run
                raise

    def _take(self, part: Part, advance: Advance) -> None:
        recipe, backend, state = self._recipe, self._backend, self.run.state
        since = 0 if part.rounds else int(state.since)
        program = (
            partial(run_part, recipe, backend, part, self._programs, self._poll, advance, *self._reads)
            if self._in_python
            else self._programs(
                backend, run_part, part, None, None if backend.compiles else self._poll, advance, *self._reads
            )
        )
        state, outcome = program(state._replace(since=0), *self._data)
        rows = len(self.run.history.steps)
        self._add(part, state._replace(since=since + part.tail), outcome)
        history = self.run.history
        if isinstance(history.cost, np.ndarray):  # otherwise a compiler is tracing
            recipe.check(backend, self.run.params, self.run.last)
            if backend.compiles:  # otherwise each round has been checked
                recipe.check_rows(backend, history, rows)

    def _add(self, part: Part, state: TunerState, outcome: Outcome) -> None:
        history = outcome.add_to(self._backend, self.run.history, part.plain, self._recipe.closing_steps)
        self.run = self._run(state, history, with_state(state, outcome.last))

    def _run(self, state: TunerState, history: History, last: Step) -> Run:
        return Run(state.inner.params, last.hparams, state, history, last)

    def _poll(self) -> None:
        """End the run if a signal has come."""
        if self._interrupts.pending:
            raise Ended

    def _stream(self, name: str, batches: Any) -> tuple[Tree, Any]:
        if is_loader(batches):
            waiting = _Waiting(batches, self._interrupts)
            batches = iter(waiting) if isinstance(batches, Iterator) else waiting
        return stream(self._backend, name, batches)


@final
class _Waiting:
    """The batches of a loader or an iterator; while one is waited for, a signal ends the run at once."""

    def __init__(self, batches: Iterable[Tree], interrupts: Interrupts) -> None:
        self._batches, self._interrupts = batches, interrupts

    def __iter__(self) -> Iterator[Tree]:
        with self._interrupts.released():
            batches = iter(self._batches)
        while True:
            with self._interrupts.released():
                batch = next(batches, self)
            if batch is self:
                return
            yield batch
