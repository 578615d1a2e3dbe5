"""Losses and derivatives that are not finite."""

import numpy as np
import optree
import pytest
from support.faults import (
    RIDGE,
    SGD,
    STILL,
    batches,
    converted,
    each_loss,
    each_tape,
    each_tree,
    estimate,
    every_estimator,
    losses,
    refused,
    ridge,
    says,
    seen,
    strengths,
    weights,
)

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


class TestNonFiniteLoss:
    @every_estimator
    @each_loss
    @parametrize("bad", [np.nan, np.inf])
    def test_says_in_which_loss(self, backend, estimator, where, data, bad):
        spoilt = {data: [batches()[0] | {"y": np.full(5, bad)}] * (3 if data == "train" else 1)}
        error = refused(errors.NonFiniteError, ArithmeticError, estimate, backend, estimator, **spoilt)
        assert (error.where, error.path) == (where, None) and (where == "T2" or error.step == 0)
        says(error, where)

    @each_tape
    @parametrize("first", [0, 3])
    def test_says_at_which_training_step(self, backend, tape, first):
        estimator, good = hg.Unrolled(SGD, steps=3, tape=tape), batches()[0]
        params, hparams, val = (converted(backend, tree) for tree in (weights(), strengths(), good))
        state = estimator.init(RIDGE, params, hparams)._replace(step=first)
        spoilt = [good | {"y": good["y"] * (np.nan if t == first + 1 else 1.0)} for t in range(6)]
        stacked = converted(backend, optree.tree_map(lambda *leaves: np.stack(leaves), *spoilt))
        train = lambda t: backend.map(lambda leaf: leaf[t], stacked)  # noqa: E731
        call = (estimator.estimate, RIDGE, state, hparams, train, val)
        error = refused(errors.NonFiniteError, ArithmeticError, *call)
        assert (error.where, error.step) == ("T1", first + 1)

    def test_in_the_steps_that_the_tuner_trains_alone(self, backend):
        good = batches()[0]
        train = [good, good | {"y": good["y"] * np.nan}, good, good]
        given = converted(backend, (weights(), strengths(), train, [good]))
        before = seen(backend, given)
        tuner = hg.Tuner(RIDGE, hg.Greedy(SGD), every=4)
        error = refused(errors.NonFiniteError, ArithmeticError, tuner.run, *given, 4)
        assert (error.where, error.step) == ("T1", 1)
        assert seen(backend, given) == before


class TestNonFiniteDerivative:
    @every_estimator
    @each_loss
    @each_tree
    def test_of_a_square_root_at_zero(self, backend, estimator, where, data, tree, leaf):
        root = {"params": lambda p, h: p["w"][0] ** 0.5, "hparams": lambda p, h: p["w"][1] * h["x"][0] ** 0.5}
        trees = {"train": STILL, tree: {leaf: np.array([0.0, 0.5])}}
        problem = losses(where, lambda p, h, b: ridge(p, h, b) + root[tree](p, h))
        error = refused(
            errors.NonFiniteError, ArithmeticError, estimate, backend, estimator, problem, **trees
        )
        assert (error.where, error.path) == (where, f"{tree}['{leaf}']")
        says(error, where, error.path)

    @each_tape
    def test_of_adam_without_epsilon(self, backend, tape):
        estimator = hg.Unrolled(hg.Adam(0.1, eps=lambda h: h["eps"]), steps=3, tape=tape)
        trees = {"params": {"w": np.zeros(2)}, "hparams": strengths() | {"eps": np.array(0.0)}}
        trees["train"] = STILL
        error = refused(errors.NonFiniteError, ArithmeticError, estimate, backend, estimator, **trees)
        says(error, error.path)
        trees["hparams"]["eps"] = np.array(1e-8)
        assert np.all(np.isfinite(estimate(backend, estimator, **trees).hypergradient["x"]))
