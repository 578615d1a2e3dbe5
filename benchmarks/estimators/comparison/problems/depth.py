"""(f) Continuously parametrised depth: output = softmax[Σ_i a(i) W_i h_i], a(i) = exp(−(i − m)²/v)."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.supervised import Supervised
from benchmarks.shared.networks import dense, weights

LAYERS = 6


class Depth(Supervised):
    """Centre and width of the layers that are read out."""

    name = "depth"
    title = f"MLP of {LAYERS} layers: how deep it is"
    source = "proposed for further work in Luketina et al. 2016"
    rule = hg.SGD(0.05, momentum=0.9)
    space = {"m": hg.Real(), "v": hg.Positive()}
    low, high = {"m": 1.0, "v": 0.1}, {"m": float(LAYERS), "v": 30.0}

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.hparams = {"m": self.array(float(LAYERS)), "v": self.array(1.0)}
        self.depths = self.array(np.arange(1, LAYERS + 1))

    @property
    def implicit(self):
        return self.neumann(0.05, self.steps // 10)

    def weights(self, rng):
        hidden = weights(rng, self.inputs, *[32] * LAYERS)
        return {"hidden": hidden, "heads": [weights(rng, 32, 10)[0] for _ in range(LAYERS)]}

    def logits(self, params, hparams, x, draw=None):
        xp, out = self.backend.xp, 0.0
        shares = xp.exp(-((self.depths - hparams["m"]) ** 2) / hparams["v"])
        for k, (layer, head) in enumerate(zip(params["hidden"], params["heads"], strict=True)):
            x = xp.tanh(dense(layer, x))
            out = out + shares[k] * dense(head, x)
        return out
