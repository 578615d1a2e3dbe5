"""A history that grows step by step, for loops that are not one program."""

from __future__ import annotations

from typing import final

import numpy as np

from hypergrad.backend import Array, Backend, Tree
from hypergrad.tuning.history import History, Row
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.state import Step

LARGEST_BACKLOG = 1024
"""The number of losses or rows that may stay on a device before they are read, which waits for the device."""


@final
class Recorder:
    """Records steps, and assembles the history when it is read.

    A value that cannot be read without waiting for a device stays there until then, or until there are
    `LARGEST_BACKLOG` of them.
    """

    def __init__(
        self, recipe: Recipe, backend: Backend, hparams: Tree, history: History | None = None
    ) -> None:
        self._recipe, self._backend, self._history = recipe, backend, history
        self._losses: list[Array] = []
        self._rows: list[Row] = []
        self._steps: list[int] = []
        self.trained = 0 if history is None else len(history.inner_values)
        """Training steps so far."""
        self._trained_at_row = 0 if history is None else int(history.steps[-1])
        if history is None:
            self._add_row(Row.of(backend, hparams, None, 0, 0.0))

    def add(self, step: Step, gradients: int | None = None) -> None:
        """Record a step.

        ``gradients`` is the number of training gradients that its estimate does not count, by default
        `Recipe.training_gradients`.
        """
        before, count, values = self.trained - self._trained_at_row, int(step.trained), step.inner_values
        if count:
            backend = self._backend
            # A copy, since a view would keep the framework's array alive.
            read = np.array(backend.to_numpy(values)) if backend.readable(values) else values
            self._losses.append(read)
            self.trained += count
        if step.updated:
            spent = self._recipe.training_gradients(step) if gradients is None else gradients
            self._add_row(self._recipe.row(self._backend, step, before + spent))
        if max(len(self._losses), len(self._rows)) >= LARGEST_BACKLOG:
            self._read()

    @property
    def history(self) -> History:
        """The history so far, in NumPy arrays. Reading it may wait for a device."""
        return self._read()

    def _add_row(self, row: Row) -> None:
        backend = self._backend
        if backend.readable(*backend.flatten(row)[0]):
            row = backend.map(lambda x: np.array(backend.to_numpy(x) if backend.owns(x) else x), row)
        self._rows.append(row)
        self._steps.append(self.trained)
        self._trained_at_row = self.trained

    def _read(self) -> History:
        history, rows, steps = self._history, self._rows, self._steps
        if history is None:
            history, rows, steps = History.first(self._backend.collect(rows[:1])), rows[1:], steps[1:]
        if self._losses:
            losses = np.concatenate([np.reshape(self._backend.to_numpy(x), -1) for x in self._losses])
            history = history.with_losses(losses)
        if rows:
            history = history.with_updates(self._backend.collect(rows), steps)
        self._history, self._losses, self._rows, self._steps = history, [], [], []
        return history
