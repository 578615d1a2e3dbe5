"""Estimates on random problems against central differences of real training."""

from functools import partial

import numpy as np
import pytest
from hypergrad_numpy import textbook
from support.frameworks import affordable, dear, each_backend, program
from support.random_problems import (
    agree,
    estimate,
    flat,
    hundred,
    hypergradient,
    network,
    problems,
    rules,
    seeds,
)

import hypergrad as hg
from hypergrad.checks.ridders import ridders


@each_backend
class TestDifferences:  # central differences of real training, to 1e-6
    # From a standstill Adam and RMSprop step along g/|g|, which has a kink where g = 0: so they start warm,
    # or where no gradient is near zero.

    @hundred(problems(), rules, seeds)
    def test_greedy(self, backend, p, rule, seed):
        Phi, z = rule.on(p)
        z = textbook.trajectory(Phi, z, p.lam, p.train[:2])[2]
        direction = np.random.default_rng(seed).normal(size=p.lam.size)

        def trained(h):
            lam = p.lam + h * direction
            return p.costs[1](Phi(z, lam, p.train[2], 2)[: p.theta.size], lam, p.val)

        slope, doubt = ridders(trained, 0.05)
        warm = estimate(backend, p, hg.Unrolled(rule.update, 2)).state
        assert doubt <= 1e-6 * (1 + abs(slope))
        agree(hypergradient(backend, p, hg.Greedy(rule.update), warm) @ direction, slope, 1e-6)

    LEARNED = {
        "sgd": dear(hg.SGD, {"momentum": 0.8}),
        "nesterov": (partial(hg.SGD, nesterov=True), {"momentum": 0.8}),
        "adam": dear(hg.Adam, {"beta1": 0.7, "beta2": 0.9, "eps": 0.1}),
        "adamw": (hg.AdamW, {"beta1": 0.7, "beta2": 0.9, "eps": 0.1}),
        "rmsprop": dear(hg.RMSprop, {"alpha": 0.8, "momentum": 0.7, "eps": 0.1}),
    }

    @pytest.mark.parametrize("kind, constants", LEARNED.values(), ids=LEARNED)
    def test_of_the_constants_of_training_and_of_data_weights(self, backend, kind, constants):
        constants = {"lr": 0.1, "weight_decay": 0.2} | constants
        update = kind(**{name: (lambda h, name=name: h[name]) for name in constants})
        rng = np.random.default_rng(0)
        theta, (train, val) = rng.uniform(size=6), rng.uniform(0.5, 1.5, size=(2, 2, 6))
        hparams = {name: np.array(x) for name, x in constants.items()} | {"weights": rng.uniform(size=6)}

        def loss(theta, batch):  # targets above all outputs, so that each gradient has one sign
            return (network(backend.xp, theta, batch[0]) - batch[1] - 4.0) ** 2

        problem = hg.Bilevel(lambda t, h, b: h["weights"] @ loss(t, b), lambda t, h, b: loss(t, b).mean())
        lam = flat(hparams)
        theta, hparams, train, val = backend.map(backend.asarray, (theta, hparams, train, val))
        unrolled, greedy = hg.Unrolled(update, 4), hg.Greedy(update)
        directions = affordable(backend, None, 1)  # None: every axis
        for estimator in (greedy, unrolled, hg.Unrolled(update, 4, tape=hg.States())):
            at = (problem, theta, hparams, lambda t: train, val, estimator)
            check = hg.check_hypergradient(*at, directions=directions)
            assert max(check.relative_error, check.difference_error) <= 1e-6
            assert check.exact_relative_error <= 1e-10

        # The first step knows no momentum; the one after the fourth does, and there every constant matters.
        start = unrolled.init(problem, theta, hparams)
        warm = unrolled.estimate(problem, start, hparams, lambda t: train, val).state
        _, tree = backend.ravel(hparams)
        one = program(backend, lambda lam: greedy.estimate(problem, warm, tree(lam), train, val))
        after = lambda lam: one(backend.asarray(lam))  # noqa: E731
        for axis, g in zip(np.eye(lam.size), flat(after(lam).hypergradient, backend), strict=True):
            slope, doubt = ridders(lambda h, axis=axis: float(after(lam + h * axis).outer_value), 0.05)
            assert max(abs(g - slope), doubt) <= 1e-6 * abs(slope)
