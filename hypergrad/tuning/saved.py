"""The state of a run and its history as a checkpoint, and back."""

from __future__ import annotations

from typing import Any, final

from hypergrad.backend import Backend
from hypergrad.tuning.checkpoint import (
    check_counters,
    check_head,
    head_of,
    leaves_of,
    restore_tree,
    tree_arrays,
)
from hypergrad.tuning.files import Head
from hypergrad.tuning.history import History
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.state import Run, TunerState

Saved = Run | tuple[TunerState, History]
"""What is saved of a run."""

_HISTORY = "history:"
"""What the names of a history's columns begin with."""


def parts(run: Saved) -> tuple[TunerState, History]:
    """Return state and history."""
    return (run.state, run.history) if isinstance(run, Run) else run


@final
class Checkpoint:
    """The checkpoints of one recipe: a head and named arrays."""

    def __init__(self, recipe: Recipe, backend: Backend) -> None:
        self._recipe, self._backend = recipe, backend

    def write(self, run: Saved) -> tuple[Head, dict[str, Any]]:
        """Return the head and the arrays of a run."""
        state, history = parts(run)
        columns = {f"{_HISTORY}{name}": column for name, column in history.arrays().items()}
        return self._head(state), tree_arrays(self._backend, "state", state) | columns

    def check(self, head: Head, model: TunerState, what: str) -> None:
        """Check that a head belongs to this recipe, and to states with the structure of ``model``.

        Raises:
            CheckpointError: if it does not; the message lists all differences.
        """
        check_head(head, self._head(model), what)

    def read(self, arrays: dict[str, Any], model: TunerState) -> tuple[TunerState, History]:
        """Return state and history from arrays whose head was checked.

        Raises:
            CheckpointError: if no run has such arrays.
        """
        columns = {name.removeprefix(_HISTORY): x for name, x in arrays.items() if name.startswith(_HISTORY)}
        leaves = {name: x for name, x in arrays.items() if not name.startswith(_HISTORY)}
        state = restore_tree(self._backend, "state", model, leaves)
        counters = {"since": state.since, "updates": state.updates, "inner.step": state.inner.step}
        check_counters({f"state.{name}": value for name, value in counters.items()})
        history = History.from_arrays(columns)
        lam = self._recipe.hparams(self._backend, model.free)
        history.check_continues(History.start(self._backend, lam))
        return state, history

    def _head(self, state: TunerState) -> Head:
        return head_of("run", self._backend, self._recipe, leaves_of(self._backend, "state", state))
