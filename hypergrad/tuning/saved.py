"""The state of a run and its history as a checkpoint, and back."""

from __future__ import annotations

from dataclasses import dataclass
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


def written(recipe: Recipe, backend: Backend, run: Saved) -> tuple[Head, dict[str, Any]]:
    """Return the head and the arrays of a run."""
    state, history = parts(run)
    columns = {f"{_HISTORY}{name}": column for name, column in history.arrays().items()}
    return _head(recipe, backend, state), tree_arrays(backend, "state", state) | columns


def _head(recipe: Recipe, backend: Backend, state: TunerState) -> Head:
    return head_of("run", backend, recipe, leaves_of(backend, "state", state))


@final
@dataclass(frozen=True)
class Expected:
    """The checkpoint that one recipe can read: of runs whose states have the structure of ``model``."""

    recipe: Recipe
    backend: Backend
    model: TunerState

    def check(self, head: Head, what: str) -> None:
        """Check that a head belongs to this recipe and structure; ``what`` it is of is for the error.

        Raises:
            CheckpointError: if it does not; the message lists all differences.
        """
        check_head(head, _head(self.recipe, self.backend, self.model), what)

    def read(self, arrays: dict[str, Any]) -> tuple[TunerState, History]:
        """Return state and history from arrays whose head was checked.

        Raises:
            CheckpointError: if no run has such arrays.
        """
        columns = {name.removeprefix(_HISTORY): x for name, x in arrays.items() if name.startswith(_HISTORY)}
        leaves = {name: x for name, x in arrays.items() if not name.startswith(_HISTORY)}
        state = restore_tree(self.backend, "state", self.model, leaves)
        counters = {"since": state.since, "updates": state.updates, "inner.step": state.inner.step}
        check_counters({f"state.{name}": value for name, value in counters.items()})
        history = History.from_arrays(columns)
        lam = self.recipe.hparams(self.backend, self.model.free)
        history.check_continues(History.start(self.backend, lam))
        return state, history
