"""Noise inside of the losses: drawn once, and generators put back."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from support.faults import (
    SGD,
    batches,
    converted,
    each_loss,
    estimate,
    every_estimator,
    fit,
    refused,
    strengths,
    surroundings,
    weights,
)
from support.frameworks import NUMPY, on_jax, with_a_generator
from support.installed import jax
from support.noise import normal

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


@with_a_generator
class TestNoiseInsideTheLoss:
    @pytest.fixture
    def noisy(self, backend):
        def loss(params, hparams, batch):
            noise = batch["noise"] if "noise" in batch else normal(backend, 5, 2)
            return fit(params, hparams, batch | {"x": batch["x"] + hparams["x"] * noise})

        return loss

    @every_estimator
    def test_is_drawn_once_for_gradient_and_product(self, backend, noisy, estimator):
        backend.random.restore(backend.random.state(seed=3))
        used = batches(1 if isinstance(estimator, hg.Greedy) else 3)
        held, after = [batch | {"noise": normal(backend, 5, 2)} for batch in used], surroundings()
        expected = estimate(backend, estimator, hg.Bilevel(noisy, fit), train=held)
        backend.random.restore(backend.random.state(seed=3))
        found = estimate(backend, estimator, hg.Bilevel(noisy, fit))
        assert surroundings() == after
        assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        assert_array_equal(found.state.params["w"], expected.state.params["w"])

    @every_estimator
    @each_loss
    def test_an_error_puts_the_generator_back(self, backend, noisy, estimator, where, data):
        spoilt = {data: [batches()[0] | {"y": np.full(5, np.nan)}] * (3 if data == "train" else 1)}
        call = (estimate, backend, estimator, hg.Bilevel(noisy, noisy))
        assert refused(errors.NonFiniteError, ArithmeticError, *call, **spoilt).where == where

    @parametrize("every", [1, 4])
    def test_an_error_in_the_tuner_puts_the_generator_back(self, backend, noisy, every):
        run, good = hg.Tuner(hg.Bilevel(noisy, noisy), hg.Greedy(SGD), every=every).run, batches()[0]
        train = [good, good, good | {"y": good["y"] * np.nan}, good]
        call = (run, *converted(backend, (weights(), strengths(), train, [good])), 4)
        assert refused(errors.NonFiniteError, ArithmeticError, *call).step == 2


@on_jax
class TestKeysInTheBatch:  # what a loss draws in JAX
    @every_estimator
    @parametrize("kind", ["key", "PRNGKey"])
    def test_serve_gradient_and_product(self, backend, estimator, kind):
        keys = [getattr(jax.random, kind)(k) for k in range(3)]
        drawn = lambda key: jax.random.normal(key, (5, 2))  # noqa: E731

        def noisy(params, hparams, batch):
            noise = batch["noise"] if "noise" in batch else drawn(batch["key"])
            return fit(params, hparams, batch | {"x": batch["x"] + hparams["x"] * noise})

        given = [batch | {"key": key} for batch, key in zip(batches(), keys, strict=True)]
        held = [batch | {"noise": np.asarray(drawn(key))} for batch, key in zip(batches(), keys, strict=True)]
        found = estimate(backend, estimator, hg.Bilevel(noisy, fit), train=given)
        expected = estimate(NUMPY, estimator, hg.Bilevel(noisy, fit), train=held)
        assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-10)
        assert_allclose(found.state.params["w"], expected.state.params["w"], rtol=1e-10)
