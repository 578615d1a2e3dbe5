"""(f) The noise with which a denoising autoencoder trains, to remove another one that has no derivative."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.supervised import Supervised
from benchmarks.shared.networks import dense, weights

LOST = 0.5


class Denoising(Supervised):
    """Noise levels of an autoencoder."""

    name = "denoising"
    title = "denoising autoencoder: the noise at its input and code, for images of which half is lost"
    source = "proposed for further work in Luketina et al. 2016; Vincent et al. 2010"
    rule = hg.Adam(3e-3)
    space = hg.Positive("softplus")
    low, high = {"noise": 0.01}, {"noise": 3.0}

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.hparams = {"noise": self.array(np.full(2, 0.02))}

    @property
    def implicit(self):
        return self.neumann(1.0, self.steps // 10)

    def parts(self, rng):
        """Targets are images; half of the pixels of the inputs of T2 and test are replaced by their mean."""
        (x, _), *rest = self.images(rng)
        lossy = [(part * (rng.random(part.shape) > LOST), part) for part, _ in rest]
        return [(x, x), *lossy]

    def weights(self, rng):
        return weights(rng, self.inputs, 64, self.inputs)

    def logits(self, params, hparams, x, draw=None):
        encoder, decoder = params
        if draw is not None:
            x = x + hparams["noise"][0] * self.noise(draw, 0, x)
        code = self.backend.xp.tanh(dense(encoder, x))
        if draw is not None:
            code = code + hparams["noise"][1] * self.noise(draw, 1, code)
        return dense(decoder, code)

    def loss(self, output, y):
        return self.backend.xp.mean((output - y) ** 2)
