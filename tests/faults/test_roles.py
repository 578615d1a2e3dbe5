"""Hyperparameters that nothing uses or one loss alone, and parameters in two places."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support.faults import (
    EAGER,
    RIDGE,
    batches,
    estimate,
    every_estimator,
    fit,
    is_right,
    plain_training,
    refused,
    ridge,
    says,
    strengths,
    weights,
)
from support.installed import jax

import hypergrad as hg
from hypergrad import errors


class TestUnusedHyperparameter:
    hparams = strengths() | {"unused": np.ones(3)}

    @every_estimator
    def test_is_named_or_allowed_and_zero(self, backend, estimator):
        call = (estimate, backend, estimator)
        error = refused(errors.DisconnectedError, ValueError, *call, hparams=self.hparams)
        assert error.path == "hparams['unused']"
        says(error, "hparams['unused']", "allow_unused")
        allowing = type(estimator)(**vars(estimator) | {"allow_unused": True})
        out = estimate(backend, allowing, hparams=self.hparams)
        assert_array_equal(out.hypergradient["unused"], np.zeros(3), strict=True)
        assert_array_equal(out.hypergradient["x"], estimate(backend, estimator).hypergradient["x"])

    @every_estimator
    def test_is_decided_by_the_graph_and_not_by_a_zero(self, backend, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + 0.0 * h["unused"].sum() * p["w"][0]  # noqa: E731
        out = estimate(backend, estimator, hg.Bilevel(inner, fit), hparams=self.hparams)
        assert_array_equal(out.hypergradient["unused"], np.zeros(3))

    def test_a_learning_rate_has_no_part_in_the_literal_equation(self, backend):
        literal, hparams = hg.Greedy(hg.SGD(lambda h: h["lr"]), "gradient"), {"lr": np.array(0.1)}
        call = (estimate, backend, literal)
        error = refused(errors.DisconnectedError, ValueError, *call, hparams=strengths() | hparams)
        assert error.path == "hparams['lr']"


class TestHyperparameterOfOneRole:
    @plain_training
    def test_in_t1_only_is_right_by_central_differences(self, backend, steps, tape):
        is_right(backend, RIDGE, steps, tape, batches()[0])

    @every_estimator
    def test_in_t1_only_is_valid_and_only_added_is_exactly_zero(self, backend, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + (h["added"] ** 2).sum()  # noqa: E731
        problem = hg.Bilevel(inner, lambda p, h, b: fit(p, h, b) + h["direct"] ** 2)
        hparams = strengths() | {"added": np.ones(3), "direct": np.array(2.0)}
        with pytest.warns(errors.ZeroResponseWarning, match=r"hparams\['added'\]"):
            found, _, _, _, report = estimate(backend, estimator, problem, hparams=hparams)
        assert np.all(found["x"] != 0.0) and found["direct"] == 4.0
        assert_array_equal(found["added"], np.zeros(3), strict=True)
        assert report.reached == {"x": True, "added": False, "direct": False}
        # A program returns arrays alone.
        returned = estimator not in EAGER and backend.name == "jax"
        known = jax.Array if returned else bool
        assert all(isinstance(responds, known) for responds in report.reached.values())


def tied(params, hparams, batch):
    hidden = batch["x"] * params["w"]
    return ((hidden / (1.0 + hidden**2) @ params["w"] - batch["y"]) ** 2).mean()


class TestTiedParameters:
    problem = hg.Bilevel(lambda p, h, b: tied(p, h, b) + (1.0 + h["x"]) ** 2 @ p["w"] ** 2, tied)

    @plain_training
    def test_one_leaf_used_twice_by_central_differences(self, backend, steps, tape):
        is_right(backend, self.problem, steps, tape, batches()[1])

    @every_estimator
    def test_one_array_in_two_places_is_two_parameters(self, backend, estimator):
        outer = lambda p, h, b: fit({"w": p["a"] * p["b"]}, h, b)  # noqa: E731
        penalty = lambda p, h: (1.0 + h["a"] ** 2) @ p["a"] ** 2 + (2.0 - h["b"]) @ p["b"] ** 2  # noqa: E731
        problem = hg.Bilevel(lambda p, h, b: outer(p, h, b) + penalty(p, h), outer)
        w, copy = (backend.asarray(weights()["w"]) for _ in range(2))
        shared, apart = {"a": w, "b": w}, {"a": w, "b": copy}
        found, expected = (
            estimate(backend, estimator, problem, params=tree, hparams=tree) for tree in (shared, apart)
        )
        for leaf in "ab":
            assert_array_equal(found.hypergradient[leaf], expected.hypergradient[leaf])
            assert_array_equal(found.state.params[leaf], expected.state.params[leaf])
        assert not np.array_equal(found.hypergradient["a"], found.hypergradient["b"])
