"""(b) A weight for each training example, where half of the labels are wrong."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.supervised import Drawn, Supervised
from benchmarks.shared.labels import area, corrupt
from benchmarks.shared.networks import cross_entropies, dense, weights

PENALTY = 1e-2


class Cleaning(Supervised):
    """Example weights of softmax regression."""

    name = "cleaning"
    title = "softmax regression: a weight for each example, half of the labels wrong"
    source = "data hyper-cleaning, Franceschi et al. 2017, Shaban et al. 2019"
    rule = hg.SGD(0.1, momentum=0.9)
    batch = None
    space = hg.Interval(0.0, 1.0)
    low, high = {"weights": 1e-3}, {"weights": 1 - 1e-3}
    share = 0.5

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.hparams = {"weights": self.array(np.full(options.examples, 0.5))}

    @property
    def implicit(self):
        return self.cg(50, 0.05) | self.amortised(0.1)

    def sample(self, seed):
        return Corrupted(self, seed)

    def parts(self, rng):
        (x, y), *rest = self.images(rng)
        labels, _ = corrupt(y.argmax(-1), 0.5, int(rng.integers(2**31)))
        return [(x, np.eye(10)[labels]), *rest]

    def weights(self, rng):
        return weights(rng, self.inputs, 10)

    def logits(self, params, hparams, x, draw=None):
        return dense(params[0], x)

    def inner(self, params, hparams, batch):
        xp = self.backend.xp
        losses = cross_entropies(xp, dense(params[0], batch["x"]), batch["y"])
        return xp.mean(hparams["weights"] * losses) + PENALTY * xp.sum(params[0]["w"] ** 2)


class Corrupted(Drawn):
    """It also knows which labels are right."""

    def __init__(self, problem, seed):
        super().__init__(problem, seed)
        (_, y), *_ = problem.images(np.random.default_rng((seed, 0)))
        self.right = self.t1[1].argmax(-1) == y.argmax(-1)

    def test(self, params, hparams):
        found = self.problem.backend.to_numpy(hparams["weights"])
        return super().test(params, hparams) | {"area": area(found, self.right)}
