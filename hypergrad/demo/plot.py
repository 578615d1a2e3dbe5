"""The figure of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.demo.compare import Comparison
from hypergrad.tuning.plot import new_figure, save_figure


def plot_comparison(comparison: Comparison, path: str | Path | None = None) -> Any:
    """Draw trajectories over a grid of the validation loss, and the evolution of each hyperparameter.

    After figures 1 and 3 of Luketina et al. 2016. Squares are starts and stars are ends; the height of
    a trajectory is the mean of the layers' log L2.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure(13, 8)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    plane = figure.add_subplot(grid[:, 0])
    noise, log_l2 = np.array(comparison.grid["noise"]), np.array(comparison.grid["log_l2"])
    image = plane.contourf(
        noise, log_l2, np.log10(comparison.grid["val_loss"]), levels=18, cmap="Greys", alpha=0.8
    )
    figure.colorbar(image, ax=plane, label="log10 of the T2 loss, hyperparameters fixed", location="bottom")
    above, below = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    for number, contestant in enumerate(comparison.contestants):
        rows, color = np.array(contestant.trajectory), f"C{number}"
        spent, sigma, strengths = rows[:, 0], rows[:, 1], rows[:, 2:]
        if contestant.cosine is None:
            marker = "s" if len(rows) == 1 else "x"
            plane.plot(sigma, strengths.mean(axis=1), marker, color=color, ms=6, label=contestant.name)
            continue
        plane.plot(sigma, strengths.mean(axis=1), color=color, lw=1.5, label=contestant.name)
        plane.plot(sigma[0], strengths[0].mean(), "s", color=color, ms=8)
        plane.plot(sigma[-1], strengths[-1].mean(), "*", color=color, ms=15, mec="black")
        above.plot(spent, sigma, color=color, label=contestant.name)
        for layer, style in zip(range(strengths.shape[1]), ("-", "--", ":", "-."), strict=False):
            label = f"layer {layer + 1}" if number == len(comparison.contestants) - 1 else None
            below.plot(spent, strengths[:, layer], style, color=color, label=label)
    plane.set(
        xlabel="standard deviation of the input noise",
        ylabel="log L2, mean of the layers",
        title="squares: starts, stars: ends, crosses: random search",
    )
    above.set(ylabel="input noise", title="evolution of the hyperparameters")
    below.set(ylabel="log L2", xlabel="training gradients spent")
    for axes in (plane, above, below):
        axes.legend(fontsize=8)
    figure.suptitle(f"{comparison.data}, {comparison.backend}, {comparison.budget} gradients each")
    return save_figure(figure, path)
