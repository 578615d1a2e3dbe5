"""The record of a tuner's run: losses, hyperparameters, hypergradients, reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Array, Backend, Scalar, Tree, vectors
from hypergrad.errors import CheckpointError
from hypergrad.estimators import Estimate
from hypergrad.estimators.report import COLUMNS
from hypergrad.tuning.checkpoint import check_head, head_of
from hypergrad.tuning.files import read_arrays, write_arrays
from hypergrad.tuning.plot import plot_history

_HEAD = head_of("history", None, None, {})
LARGEST_LEAF = 1024
"""Leaves with more entries than this are recorded by their minimum, mean and maximum alone."""


class Row(NamedTuple):
    """The record of one update of the hyperparameters, as numbers that a compiled loop can collect."""

    values: dict[str, Any]
    outer_value: Scalar
    hypergradient_norm: Scalar
    clipped: Any
    cost: Scalar
    reports: dict[str, Any]

    @classmethod
    def of(cls, backend: Backend, hparams: Tree, out: Estimate[Any] | None, clipped: Any, cost: Any) -> Row:
        """Return the row for λ after an update, or before the first one if there is no estimate yet."""
        paths, leaves = backend.paths(hparams, "hparams"), backend.flatten(hparams)[0]
        values = {path: _summary(backend, leaf) for path, leaf in zip(paths, leaves, strict=True)}
        if out is None:
            nan = float("nan")
            return cls(values, nan, nan, clipped, cost, {name: nan for name in COLUMNS})
        norm = vectors.norm(backend, out.hypergradient)
        return cls(values, out.outer_value, norm, clipped, cost, out.report.columns())


@final
@dataclass(frozen=True)
class History:
    """A row for each update of the hyperparameters, and the training loss of every step.

    All columns are NumPy arrays, except in a run that is itself being compiled or mapped in JAX: there they
    are arrays of JAX, and a start whose run stopped early has NaN from there on.

    Attributes:
        inner_values: C̃1 at each training step.
        steps: the training step of each update; row 0 is the start, before any update.
        values: the hyperparameters after each update, by path, in their own domain.
        outer_values: C2 as the estimator measured it; NaN in row 0.
        hypergradient_norms: ‖dC2/dλ‖; NaN in row 0.
        clipped: how many entries a projection put back into their space.
        cost: gradients spent since the start; a second-order product counts as two.
        reports: the other numbers of `Report`, by name; NaN in row 0.
    """

    inner_values: Array
    steps: Array
    values: dict[str, Array]
    outer_values: Array
    hypergradient_norms: Array
    clipped: Array
    cost: Array
    reports: dict[str, Array]

    def __repr__(self) -> str:
        return f"History({len(self.steps) - 1} updates, {len(self.inner_values)} training steps)"

    @classmethod
    def start(cls, backend: Backend, hparams: Tree) -> History:
        """Return a history of row 0 alone: the start, before any update."""
        return cls.first(backend.collect([Row.of(backend, hparams, None, 0, 0.0)]))

    @classmethod
    def first(cls, row: Row) -> History:
        """Return a history of one collected row."""
        return cls(
            np.zeros(0),
            np.zeros(1, int),
            {path: _joined(parts) for path, parts in row.values.items()},
            row.outer_value,
            row.hypergradient_norm,
            row.clipped,
            row.cost,
            row.reports,
        )

    def with_updates(self, rows: Row, steps: Array) -> History:
        """Return the history with more rows, collected along their first axis, at these training steps."""
        columns = {
            "values": {path: _joined(parts) for path, parts in rows.values.items()},
            "outer_values": rows.outer_value,
            "hypergradient_norms": rows.hypergradient_norm,
            "clipped": rows.clipped,
            "cost": self.cost[-1] + rows.cost.cumsum(),
            "reports": rows.reports,
        }

        def extend(old: Any, new: Any) -> Any:
            if isinstance(old, dict):
                return {name: extend(old[name], new[name]) for name in old}
            return namespace(old, new).concatenate([old, new])

        longer = {name: extend(getattr(self, name), column) for name, column in columns.items()}
        return History(self.inner_values, np.concatenate([self.steps, steps]), **longer)

    def with_losses(self, inner_values: Array) -> History:
        """Return the history with the losses of more training steps."""
        joined = namespace(inner_values).concatenate([self.inner_values, inner_values])
        return History(**{**vars(self), "inner_values": joined})

    def arrays(self) -> dict[str, Any]:
        """Return all columns as named arrays, with float32 in place of dtypes that NumPy does not have."""
        columns = {name: column for name, column in vars(self).items() if name not in ("values", "reports")}
        columns |= {f"value:{path}": rows for path, rows in self.values.items()}
        columns |= {f"report:{name}": rows for name, rows in self.reports.items()}
        return {name: x.astype(np.float32) if x.dtype.kind == "V" else x for name, x in columns.items()}

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file. If that fails, an older file is unchanged.

        Raises:
            OSError: if the file cannot be written.
        """
        write_arrays(path, _HEAD, self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is not a history. No code in it is run.
            FileNotFoundError: if it does not exist.
        """
        _, columns = read_arrays(path, lambda head: check_head(head, _HEAD, str(path)))
        return cls.from_arrays(columns)

    @classmethod
    def from_arrays(cls, columns: dict[str, Any]) -> History:
        """Rebuild a history from the result of `arrays`.

        Raises:
            CheckpointError: if a column is missing, unknown, too short, or of another kind of numbers.
        """
        values, reports = (
            {name.removeprefix(kind): rows for name, rows in columns.items() if name.startswith(kind)}
            for kind in ("value:", "report:")
        )
        own = [name for name in cls.__dataclass_fields__ if name not in ("values", "reports")]
        expected = {*own, *(f"report:{name}" for name in COLUMNS), *(f"value:{name}" for name in values)}
        if missing := sorted(expected ^ columns.keys()):
            raise CheckpointError(f"this is not a history: it has no column, or an unknown one: {missing}")
        history = cls(**{name: columns[name] for name in own}, values=values, reports=reports)
        history._check()
        return history

    def check_continues(self, other: History) -> None:
        """Check that this history can be one of the same hyperparameters as another.

        Raises:
            CheckpointError: if it has other columns.
        """
        shapes = [{name: np.shape(x)[1:] for name, x in h.arrays().items()} for h in (self, other)]
        if shapes[0] != shapes[1]:
            names = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
            raise CheckpointError(f"the history is one of other hyperparameters; it differs in {names}")

    def _check(self) -> None:
        steps, rows = np.asarray(self.steps), len(np.atleast_1d(self.steps))
        for name, column in self.arrays().items():
            shape, kind = np.shape(column), np.asarray(column).dtype.kind
            length = np.size(column) if name == "inner_values" else rows
            if kind not in "iufb" or shape[:1] != (length,) or (":" not in name and len(shape) > 1):
                raise CheckpointError(f"this is not a history of {rows} rows: {name} is {kind!r}{shape}")
        if steps.dtype.kind not in "iu" or rows < 1 or (np.diff(steps, prepend=0) < 0).any():
            raise CheckpointError(f"this is not a history: the steps of its updates are {steps}")
        if steps[-1] > len(self.inner_values):
            raise CheckpointError("this is not a history: it has fewer losses than training steps")

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw losses and hyperparameters over training; see `hypergrad.tuning.plot`."""
        return plot_history(self, path)


def _summary(backend: Backend, leaf: Array) -> Any:
    """Return a small leaf unchanged, and the minimum, mean and maximum of a large one."""
    xp = backend.xp
    if vectors.size(backend, leaf) <= LARGEST_LEAF:
        return leaf
    return xp.min(leaf), xp.mean(leaf), xp.max(leaf)


def _joined(column: Any) -> Array:
    """Join the three columns of a summary into one array."""
    if isinstance(column, tuple):
        return namespace(*column).stack(column, -1)
    return column


def namespace(*columns: Array) -> Any:
    """Return NumPy, or the namespace of the arrays if a compiler traces them."""
    traced = [column for column in columns if not isinstance(column, np.ndarray)]
    return traced[0].__array_namespace__() if traced else np
