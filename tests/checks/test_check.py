"""`check_hypergradient` says what is right, what is biased and what is wrong."""

from dataclasses import dataclass

import autograd.numpy as anp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.errors import ArgumentError
from hypergrad.testing.problems import regression

PROBLEM, PARAMS, HPARAMS, TRAIN, VAL = regression(get_backend("numpy"))
RULE = hg.SGD(0.02, momentum=0.9)


def check(estimator, params=PARAMS, train=lambda t: TRAIN, **options):
    return hg.check_hypergradient(PROBLEM, params, HPARAMS, train, VAL, estimator, **options)


def optimum():
    long = hg.Unrolled(hg.SGD(0.1), 200)
    return long.estimate(
        PROBLEM, long.init(PROBLEM, PARAMS, HPARAMS), HPARAMS, lambda t: TRAIN, VAL
    ).state.params


@pytest.mark.parametrize(
    "estimator", [hg.Greedy(RULE), hg.Unrolled(RULE, 7), hg.Unrolled(hg.Adam(0.01), 7)], ids=repr
)
def test_what_is_exact_shows_only_rounding(estimator):
    found = check(estimator)
    assert found.relative_error < 1e-8 and found.cosine > 1 - 1e-8 and found.difference_error < 1e-6
    assert found.exact_relative_error < 1e-12 and found.exact_cosine > 1 - 1e-12
    assert "central differences" in str(found) and "real training" in str(found)


def test_implicit_is_exact_at_an_optimum():
    found = check(hg.Implicit(hg.CG(rtol=1e-12)), optimum())
    assert found.relative_error < 1e-8 and found.exact_relative_error < 1e-8
    trained = check(hg.Implicit(hg.CG(rtol=1e-12)), optimum(), update=hg.SGD(0.1), steps=60)
    assert trained.relative_error < 1e-6


def test_a_longer_training_shows_the_bias_of_greed():
    assert check(hg.Greedy(RULE), steps=30).relative_error > 0.1
    assert check(hg.Unrolled(RULE, 30, truncate=2)).relative_error > 0.1


def test_a_wrong_estimator_is_found_out():
    @dataclass(frozen=True)
    class Wrong(hg.HypergradientEstimator):
        update: hg.SGD = RULE
        training_steps = 1

        def _init(self, backend, params):
            return hg.Greedy(self.update)._init(backend, params)

        def _estimate(self, backend, *arguments):
            out = hg.Greedy(self.update)._estimate(backend, *arguments)
            g = out.hypergradient
            return out._replace(hypergradient=g | {"tilt": 2.0 * g["tilt"]})

    assert check(Wrong()).relative_error > 0.1


def test_many_hyperparameters_are_checked_along_random_directions():
    problem = hg.Bilevel(
        lambda p, h, b: anp.sum((p - 1) ** 2) + anp.sum(anp.exp(h) * p**2), lambda p, h, b: anp.sum(p**4)
    )
    found = hg.check_hypergradient(problem, np.ones(100), np.zeros(100), None, None, hg.Greedy(hg.SGD(0.01)))
    assert len(found.differences) == 32 and found.relative_error < 1e-8
    assert "along 32 directions\n" in str(found)


def test_batches_may_come_from_a_list_or_an_iterator():
    assert check(hg.Unrolled(RULE, 3), train=[TRAIN] * 3).relative_error < 1e-8
    assert check(hg.Unrolled(RULE, 3), train=iter([TRAIN] * 3)).relative_error < 1e-8


def test_an_update_needs_a_length():
    with pytest.raises(ArgumentError, match="steps="):
        check(hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=1e9)), update=RULE)
