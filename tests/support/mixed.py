"""Problems and estimators for the mixed term by finite differences.

Losses are written in the array functions that the frameworks share.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch

import hypergrad as hg
from support.frameworks import each

parametrize = pytest.mark.parametrize
on_both = each("numpy", "torch")
FORGIVING = float("inf")


class Task(NamedTuple):
    """What an estimate takes; ``calls`` counts the evaluations of C̃1 and of C2."""

    problem: hg.Bilevel
    params: dict
    hparams: dict
    train: dict
    val: dict
    calls: dict

    def warm(self, estimator, steps=3):
        """The state after some training: Adam's first step hardly depends on the size of a gradient."""
        state = estimator.init(self.problem, self.params, self.hparams)
        for _ in range(steps * estimator.training_steps):
            state = estimator.estimate(self.problem, state, self.hparams, self.train, self.val).state
        return state

    def estimate(self, estimator, state=None):
        state = estimator.init(self.problem, self.params, self.hparams) if state is None else state
        self.calls.clear()
        return estimator.estimate(self.problem, state, self.hparams, self.train, self.val)


def given(b):
    """The noise that comes with the batch."""
    return b["noise"]


def drawn(b):
    """The noise that the framework draws from its own generator."""
    shape = tuple(b["noise"].shape)
    if isinstance(b["noise"], torch.Tensor):
        return torch.randn(shape, dtype=torch.float64)
    return np.random.normal(size=shape)


def net(backend, noise=given, seed=0, log_l2=(1.0, 1.5), **constants):
    """Regression by a small tanh net, trained with noise on its inputs and a penalty for each layer.

    Validation judges it with noise too, of its own. The penalties make the training loss convex at θ.
    """
    xp, rng, calls = backend.xp, np.random.default_rng(seed), {}

    def predict(params, x):
        return xp.tanh(x @ params["w"]) @ params["v"]

    def error(params, x, y):
        residual = predict(params, x) - y
        return xp.mean(residual * residual)

    def inner(params, hparams, b):
        calls["inner"] = calls.get("inner", 0) + 1
        strengths = xp.exp(hparams["log_l2"])
        penalty = strengths[0] * xp.sum(params["w"] ** 2) + strengths[1] * xp.sum(params["v"] ** 2)
        return error(params, b["x"] + hparams["noise"] * noise(b), b["y"]) + penalty

    def outer(params, hparams, b):
        calls["outer"] = calls.get("outer", 0) + 1
        return error(params, b["x"] + 0.5 * noise(b), b["y"])

    def normal(scale=1.0, **shapes):
        return {name: backend.asarray(scale * rng.normal(size=shape)) for name, shape in shapes.items()}

    params = normal(0.3, w=(3, 4), v=4)
    hparams = {"log_l2": log_l2, "noise": 0.4} | constants
    hparams = {name: backend.asarray(np.array(value)) for name, value in hparams.items()}
    train, val = (normal(x=(8, 3), noise=(8, 3), y=8) for _ in range(2))
    return Task(hg.Bilevel(inner, outer), params, hparams, train, val, calls)


def flat(tree):
    """All numbers of a tree of arrays, by the order of its paths."""
    if isinstance(tree, dict):
        return np.concatenate([flat(tree[name]) for name in sorted(tree)])
    return np.ravel(tree.detach().numpy() if isinstance(tree, torch.Tensor) else tree).astype(float)


def distance(mine, exact):
    mine, exact = flat(mine), flat(exact)
    assert np.linalg.norm(exact) > 0
    return float(np.linalg.norm(mine - exact) / np.linalg.norm(exact))


def learned_rate(h):
    return h["lr"]


GREEDY = {
    "sgd": (partial(hg.Greedy, hg.SGD(0.1)), {}),
    "momentum": (partial(hg.Greedy, hg.SGD(0.1, momentum=0.9, nesterov=True)), {}),
    "adam": (partial(hg.Greedy, hg.Adam(0.02)), {}),
    "sgd-learned-rate": (partial(hg.Greedy, hg.SGD(learned_rate)), {"lr": 0.1}),
    "adam-learned-rate": (partial(hg.Greedy, hg.Adam(learned_rate)), {"lr": 0.02}),
    "no-lookahead": (partial(hg.Greedy, hg.SGD(0.1), lookahead=False), {}),
    "gradient-of-sgd": (partial(hg.Greedy, hg.SGD(0.1), response="gradient"), {}),
    "gradient-of-adam": (partial(hg.Greedy, hg.Adam(0.02), response="gradient"), {}),
}
every_greedy = parametrize(("make", "constants"), GREEDY.values(), ids=GREEDY)
IMPLICIT = {
    "cg": partial(hg.Implicit, hg.CG(rtol=1e-6), checks=hg.Checks(tolerance=FORGIVING)),
    "direct": partial(hg.Implicit, hg.Direct(), checks=hg.Checks(tolerance=FORGIVING)),
    "neumann": partial(hg.Implicit, hg.Neumann(8, step_size=0.03), checks=hg.Checks(tolerance=FORGIVING)),
    "neumann-power": partial(
        hg.Implicit, hg.Damped(hg.Neumann(8), 1.0), checks=hg.Checks(tolerance=FORGIVING)
    ),
    "identity": partial(hg.Implicit, hg.Identity(0.1), checks=hg.Checks(tolerance=FORGIVING)),
}
every_implicit = parametrize("make", IMPLICIT.values(), ids=IMPLICIT)
SIDES = {"two-sided": (hg.FiniteDifference(), 1e-7), "one-sided": (hg.FiniteDifference(sides=1), 1e-4)}
both_sides = parametrize(("mixed", "tolerance"), SIDES.values(), ids=SIDES)
