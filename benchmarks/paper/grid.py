"""The grid search of figures 1 and 7: λ fixed at each of its points, with one split and first weights."""

from __future__ import annotations

import numpy as np

from benchmarks.paper.lab import Lab
from benchmarks.paper.logs import Record
from benchmarks.paper.settings import L2, NOISE, Setting


def axes(lab: Lab, setting: Setting) -> dict[str, np.ndarray]:
    """The grid's values of its two hyperparameters."""
    n = lab.preset.grid
    lines = {"l2": np.geomspace(*L2, n), "input_noise": np.linspace(*NOISE, n)}
    lines["hidden_noise"] = lines["input_noise"]
    return {name: lines[name] for name in setting.hparams}


def grid(lab: Lab, setting: Setting) -> list[Record]:
    """The runs at its points, the second hyperparameter changing first."""
    points = np.stack(np.meshgrid(*axes(lab, setting).values(), indexing="ij"), -1).reshape(-1, 2)
    hparams = [
        setting.filled(dict(zip(setting.hparams, map(float, p), strict=True)), lab.images.shape)
        for p in points
    ]
    return lab.jobs(setting, "grid", None, [lab.seed] * len(points), hparams)
