"""(a) A network with an L2 strength for each layer, and noise at its input and hidden layer."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.supervised import Supervised
from benchmarks.shared.networks import dense, weights


class Regularisation(Supervised):
    """Logarithms of L2 strengths, and standard deviations of additive noise."""

    name = "regularisation"
    title = "MLP: an L2 strength for each layer, noise at input and hidden layer"
    source = "Luketina et al. 2016"
    rule = hg.SGD(0.1, momentum=0.9)
    space = {"log_l2": hg.Real(), "noise": hg.Positive("softplus")}
    low = {"log_l2": -12.0, "noise": 0.01}
    high = {"log_l2": -2.0, "noise": 2.0}

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.hparams = {"log_l2": self.array(np.full(3, -3.0)), "noise": self.array(np.full(2, 1.5))}

    @property
    def implicit(self):
        return self.neumann(0.1, self.steps // 10) | self.amortised(0.1)

    def weights(self, rng):
        return weights(rng, self.inputs, 64, 64, 10)

    def logits(self, params, hparams, x, draw=None):
        *hidden, last = params
        for k, layer in enumerate(hidden):
            if draw is not None:
                x = x + hparams["noise"][k] * self.noise(draw, k, x)
            x = self.backend.xp.tanh(dense(layer, x))
        return dense(last, x)

    def inner(self, params, hparams, batch):
        strengths = self.backend.xp.exp(hparams["log_l2"])
        squares = (self.backend.xp.sum(layer["w"] ** 2) for layer in params)
        return super().inner(params, hparams, batch) + sum(strengths[k] * s for k, s in enumerate(squares))
