"""(d) A learning-rate schedule, as a broken line in the logarithm."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.supervised import Supervised
from benchmarks.shared.networks import tanh_network, weights

KNOTS = 8


class Schedule(Supervised):
    """Logarithms of rates at equal distances in a run; between them the line is straight."""

    name = "schedule"
    title = f"MLP: a learning-rate schedule with {KNOTS} knots"
    source = "Maclaurin et al. 2015"
    batch = 20
    space = hg.Real()
    low, high = {"log_lr": np.log(1e-4)}, {"log_lr": np.log(1.0)}

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.hparams = {"log_lr": self.array(np.full(KNOTS, np.log(0.003)))}
        # The weight of each knot in the rate of each step.
        at, knots = np.linspace(0, KNOTS - 1, self.steps), np.arange(KNOTS)
        hats = self.array(np.maximum(0, 1 - np.abs(at[:, None] - knots)))

        def rate(hparams, step):
            return backend.xp.exp(backend.xp.sum(hats[step] * hparams["log_lr"]))

        self.rule = hg.SGD(hg.Schedule(rate), momentum=0.9)

    def weights(self, rng):
        return weights(rng, self.inputs, 32, 32, 10)

    def logits(self, params, hparams, x, draw=None):
        return tanh_network(self.backend.xp, params, x)
