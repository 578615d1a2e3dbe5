"""Hyperparameters that pass only through operations whose derivative is zero wherever it exists."""

import warnings

import autograd.numpy as anp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support.faults import estimate, every_estimator, fit, refused, ridge, says, strengths
from support.installed import jax, torch

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


def functions(backend):
    """The framework's own functions of these names."""
    return {"numpy": anp, "torch": torch, "jax": jax and jax.numpy, "pebble": None}[backend.name]


STEPS = {
    "round": lambda np, x: np.round(x),
    "floor": lambda np, x: np.floor(x),
    "ceil": lambda np, x: np.ceil(x),
    "sign": lambda np, x: np.sign(x),
    "nested": lambda np, x: np.sign(np.exp(x) + 2.0 * x) * 3.0,
}
each_step = parametrize("step", STEPS.values(), ids=STEPS)


def hparams():
    return strengths() | {"flat": np.array([0.7, 2.6])}


def in_both(step, where):
    """Problems in which a hyperparameter passes through a step, in one loss."""

    def extra(h, np):
        return step(np, h["flat"]).sum()

    def problem(np):
        inner = lambda p, h, b: ridge(p, h, b) * (extra(h, np) if where == "inner" else 1.0)  # noqa: E731
        outer = lambda p, h, b: fit(p, h, b) + (extra(h, np) if where == "outer" else 0.0)  # noqa: E731
        return hg.Bilevel(inner, outer)

    return problem


@each_step
@parametrize("where", ["inner", "outer"])
class TestSteps:
    @every_estimator
    def test_give_exact_zeros_and_a_warning(self, backend, estimator, step, where):
        problem = in_both(step, where)(functions(backend))
        with pytest.warns(errors.ZeroResponseWarning, match=r"hparams\['flat'\]") as said:
            out = estimate(backend, estimator, problem, hparams=hparams())
        assert len([w for w in said if w.category is errors.ZeroResponseWarning]) == 1
        assert_array_equal(out.hypergradient["flat"], np.zeros(2), strict=True)
        assert np.all(out.hypergradient["x"] != 0.0) and not out.report.reached["flat"]

    def test_are_silent_if_they_are_meant(self, backend, step, where):
        problem = in_both(step, where)(functions(backend))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            estimate(backend, hg.Greedy(hg.SGD(0.1), allow_unused=True), problem, hparams=hparams())


@every_estimator
def test_another_way_with_a_slope_is_enough(backend, estimator):
    np_ = functions(backend)
    problem = hg.Bilevel(lambda p, h, b: ridge(p, h, b) * (np_.round(h["x"]) + h["x"] ** 2).sum(), fit)
    out = estimate(backend, estimator, problem)
    assert np.all(out.hypergradient["x"] != 0.0)


def test_a_comparison_is_never_silent(backend):
    problem = hg.Bilevel(lambda p, h, b: ridge(p, h, b) + ((h["flat"] > 1.0) * p["w"][:2] ** 2).sum(), fit)
    greedy = hg.Greedy(hg.SGD(0.1))
    if backend.name == "torch":  # a tensor of booleans has no graph
        error = refused(
            errors.DisconnectedError, ValueError, estimate, backend, greedy, problem, hparams=hparams()
        )
        says(error, "hparams['flat']", "compared")
    else:
        with pytest.warns(errors.ZeroResponseWarning, match=r"hparams\['flat'\]"):
            estimate(backend, greedy, problem, hparams=hparams())


def test_a_check_says_that_both_are_exactly_zero(backend):
    np_, lam = functions(backend), backend.asarray(np.array([0.7, 2.6]))
    problem = hg.Bilevel(
        lambda w, h, _: ((w - 1.0) ** 2).sum() * np_.round(h).sum(), lambda w, h, _: (w**2).sum()
    )
    with pytest.warns(errors.ZeroResponseWarning):
        found = hg.check_hypergradient(
            problem, backend.asarray(np.zeros(2)), lam, None, None, hg.Unrolled(hg.SGD(0.1), 3)
        )
    assert "both are exactly zero" in str(found)
