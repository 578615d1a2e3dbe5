"""Figures of a run, by matplotlib's object interface: no global state."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.errors import MissingExtraError


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib ``Figure``.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("figures need matplotlib: python -m pip install 'hypergradients[plot]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path | None) -> Any:
    """Return the figure, and write it to a file if a path is given."""
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def plot_history(history: Any, path: str | Path | None = None) -> Any:
    """Draw losses and hyperparameters of a `History` over training steps; return a matplotlib ``Figure``.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure(9, 4)
    losses, values = figure.subplots(1, 2)
    losses.plot(np.arange(1, len(history.inner_values) + 1), history.inner_values, lw=0.5, label="T1")
    losses.plot(history.steps, history.outer_values, label="T2")
    losses.set(xlabel="training step", ylabel="loss")
    for name, rows in history.values.items():
        columns = np.stack(rows).reshape(len(rows), -1)
        for i in range(columns.shape[1]):
            label = name.removeprefix("hparams") + (f"[{i}]" if columns.shape[1] > 1 else "")
            values.plot(history.steps, columns[:, i], label=label if i < 6 else None)
    values.set(xlabel="training step", ylabel="hyperparameter")
    for axes in (losses, values):
        axes.legend(fontsize=8)
    return save_figure(figure, path)
