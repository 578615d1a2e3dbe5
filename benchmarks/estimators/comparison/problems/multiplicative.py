"""(f) Multiplicative Gaussian noise in place of dropout, of another strength at each layer."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.supervised import Supervised
from benchmarks.shared.networks import dense, weights


class MultiplicativeNoise(Supervised):
    """A standard deviation for each layer."""

    name = "multiplicative"
    title = "MLP: multiplicative noise at each layer, in place of dropout"
    source = "proposed for further work in Luketina et al. 2016; Srivastava et al. 2014, section 10"
    rule = hg.SGD(0.1, momentum=0.9)
    space = hg.Positive("softplus")
    low, high = {"deviation": 0.01}, {"deviation": 2.0}

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.hparams = {"deviation": self.array(np.full(3, 1.5))}

    @property
    def implicit(self):
        return self.neumann(0.1, self.steps // 10)

    def weights(self, rng):
        return weights(rng, self.inputs, 64, 64, 10)

    def logits(self, params, hparams, x, draw=None):
        for k, layer in enumerate(params):
            if draw is not None:
                x = x * (1.0 + hparams["deviation"][k] * self.noise(draw, k, x))
            x = dense(layer, x)
            if k < len(params) - 1:
                x = self.backend.xp.tanh(x)
        return x
