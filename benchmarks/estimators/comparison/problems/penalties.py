"""(c) Ridge regression with a penalty for each feature."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.supervised import Supervised


class Penalties(Supervised):
    """Logarithms of ridge penalties."""

    name = "penalties"
    title = "ridge regression: a penalty for each of 65 features"
    source = "Foo et al. 2008"
    rule = hg.SGD(0.02, momentum=0.9)
    batch = None
    data = "diabetes, with squares and products"
    space = hg.Interval(-12.0, 4.0)
    low, high = {"log_l2": -10.0}, {"log_l2": 2.0}

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.hparams = {"log_l2": self.array(np.full(65, -8.0))}

    @property
    def implicit(self):
        return self.cg(200, 1e-2) | self.amortised(0.02)

    def parts(self, rng):
        """Diabetes: ten measurements, their squares and products; the target has mean 0 and deviation 1."""
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True)
        rows, n = rng.permutation(len(x)), 150
        x, y = x[rows], y[rows]
        x = (x - x[:n].mean(0)) / x[:n].std(0)
        i, j = np.triu_indices(10)
        x = np.concatenate([x, x[:, i] * x[:, j]], 1)
        x, y = (x - x[:n].mean(0)) / x[:n].std(0), (y - y[:n].mean()) / y[:n].std()
        return [(x[part], y[part]) for part in (slice(n), slice(n, 2 * n), slice(2 * n, None))]

    def weights(self, rng):
        return np.zeros(65)

    def logits(self, params, hparams, x, draw=None):
        return x @ params

    def loss(self, output, y):
        return self.backend.xp.mean((output - y) ** 2)

    def inner(self, params, hparams, batch):
        penalty = self.backend.xp.sum(self.backend.xp.exp(hparams["log_l2"]) * params**2)
        return self.loss(batch["x"] @ params, batch["y"]) + penalty
