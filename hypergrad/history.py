"""What happened in a run of `Tuner`: losses, hyperparameters, hypergradients, reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from hypergrad import vectors
from hypergrad.backend import Backend, Tree
from hypergrad.checkpoint import read_arrays, write_arrays
from hypergrad.errors import CheckpointError
from hypergrad.estimators import Estimate

LARGEST_LEAF = 1024
"""A leaf with more entries is logged by its least, mean and largest one."""

_REPORTED = (
    "inner_gradient_norm",
    "direct_norm",
    "response_norm",
    "residual",
    "iterations",
    "gradients",
    "products",
    "bytes_held",
)


@final
@dataclass
class History:
    """One row for each update of the hyperparameters, and the training loss of every step.

    Attributes:
        inner_values: C̃1 at each training step.
        steps: the training step of each update; row 0 is the start, before any update.
        values: the hyperparameters after each update, by path, in their own domain.
        outer_values: C2 as the estimator measured it; NaN in row 0.
        hypergradient_norms: ‖dC2/dλ‖; NaN in row 0.
        clipped: entries that a projection had to move back into their space.
        cost: gradients spent since the start, a second-order product counting two.
        reports: the other numbers of `Report`, by name; NaN in row 0.
    """

    inner_values: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    values: dict[str, list[Any]] = field(default_factory=dict)
    outer_values: list[float] = field(default_factory=list)
    hypergradient_norms: list[float] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    reports: dict[str, list[float]] = field(default_factory=dict)

    def record(
        self, backend: Backend, step: int, hparams: Tree, out: Estimate | None, clipped: int, spent: float
    ) -> None:
        """Add a row: an update of the hyperparameters, or the start if there is no estimate yet."""
        self.steps.append(step)
        self.clipped.append(clipped)
        self.cost.append(spent)
        for path, leaf in zip(backend.paths(hparams, "hparams"), backend.flatten(hparams)[0], strict=True):
            value = backend.to_numpy(leaf)
            if value.size > LARGEST_LEAF:
                value = np.array([value.min(), value.mean(), value.max()])
            self.values.setdefault(path, []).append(np.array(value))
        norm = outer = float("nan")
        if out is not None:
            outer = float(out.outer_value)
            norm = float(backend.to_numpy(vectors.norm(backend, out.hypergradient)))
        self.outer_values.append(outer)
        self.hypergradient_norms.append(norm)
        for name in _REPORTED:
            number = float("nan") if out is None else float(getattr(out.report, name))
            self.reports.setdefault(name, []).append(number)

    def arrays(self) -> dict[str, Any]:
        """All of it as named arrays."""
        columns: dict[str, Any] = {
            "inner_values": np.array(self.inner_values, float),
            "steps": np.array(self.steps, int),
            "outer_values": np.array(self.outer_values, float),
            "hypergradient_norms": np.array(self.hypergradient_norms, float),
            "clipped": np.array(self.clipped, int),
            "cost": np.array(self.cost, float),
        }
        columns |= {f"value:{path}": np.stack(rows) for path, rows in self.values.items()}
        columns |= {f"report:{name}": np.array(rows, float) for name, rows in self.reports.items()}
        return columns

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file, whole or not at all.

        Raises:
            OSError: if the file cannot be written; an older one is then left as it was.
        """
        write_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is not a history; no code of it is run.
            FileNotFoundError: if there is none.
        """
        return cls.from_arrays(read_arrays(path))

    @classmethod
    def from_arrays(cls, columns: dict[str, Any]) -> History:
        """Rebuild from `arrays`.

        Raises:
            CheckpointError: if a column is missing.
        """
        try:
            return cls(
                inner_values=columns["inner_values"].tolist(),
                steps=columns["steps"].tolist(),
                values={key[6:]: list(rows) for key, rows in columns.items() if key.startswith("value:")},
                outer_values=columns["outer_values"].tolist(),
                hypergradient_norms=columns["hypergradient_norms"].tolist(),
                clipped=columns["clipped"].tolist(),
                cost=columns["cost"].tolist(),
                reports={
                    key[7:]: rows.tolist() for key, rows in columns.items() if key.startswith("report:")
                },
            )
        except KeyError as error:
            raise CheckpointError(f"this is no history: it has no column {error}") from error

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw losses and hyperparameters over training; see `hypergrad.plot.plot_history`."""
        from hypergrad.plot import plot_history

        return plot_history(self, path)
