"""A tuner gives each kind of warning once, at the user's line, and its history says it of every update."""

import warnings

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.errors import Failure

GOOD, BAD = np.eye(4), np.diag([1.0, 10.0, 100.0, 1000.0])  # CG needs one step, or four
IMPLICIT = hg.Implicit(hg.CG(max_steps=2), checks=hg.Checks(unsolved="warn", away="ignore"))


def run(backend, batches, steps, **options):
    xp = backend.xp
    problem = hg.Bilevel(
        lambda w, h, b: 0.5 * xp.sum(w * (b["hessian"] @ w)) - xp.sum(w) + 0.5 * h * xp.sum(w**2),
        lambda w, h, b: xp.sum((w - 2.0) ** 2 * backend.asarray(np.arange(1.0, 5.0))),
    )
    options = {"update": hg.SGD(1e-4), "every": 1, "hyper_update": hg.SGD(0.0)} | options
    tuner = hg.Tuner(problem, IMPLICIT, **options)
    w, penalty = backend.asarray(np.zeros(4)), backend.asarray(np.array(0.1))
    return tuner.run(w, penalty, [{"hessian": backend.asarray(b)} for b in batches], [None], steps)


def given(f, *args, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = f(*args, **options)
    return out, [warning for warning in said if issubclass(warning.category, hg.errors.HypergradWarning)]


class TestARun:
    def test_says_once_that_solves_failed(self, backend):
        _, said = given(run, backend, [BAD], 6)
        assert [warning.category for warning in said] == [hg.errors.SolveWarning]
        assert said[0].filename == __file__

    @pytest.mark.parametrize("bad", range(3))
    def test_says_it_of_a_round_in_the_middle(self, backend, bad):
        batches = [GOOD, GOOD, GOOD]
        batches[bad] = BAD
        out, said = given(run, backend, batches, 3)
        assert [warning.category for warning in said] == [hg.errors.SolveWarning]
        failures = out.history.reports["solve.failure"][1:]
        assert [failure != Failure.NONE for failure in failures] == [k == bad for k in range(3)]

    def test_says_nothing_if_all_is_well(self, backend):
        out, said = given(run, backend, [GOOD], 3)
        assert not said and (out.history.reports["solve.failure"][1:] == Failure.NONE).all()

    def test_the_next_run_says_it_again(self):
        backend = get_backend("numpy")
        assert len(given(run, backend, [BAD], 2)[1]) == len(given(run, backend, [BAD], 2)[1]) == 1


def test_two_leaves_without_response_are_two_warnings(backend):
    xp = backend.xp
    problem = hg.Bilevel(
        lambda w, h, b: xp.sum((w - 1.0) ** 2) + h["a"] + h["b"], lambda w, h, b: xp.sum(w**2)
    )
    tuner = hg.Tuner(problem, hg.Greedy(hg.SGD(0.1)), every=1)
    lam = {"a": backend.asarray(np.array(1.0)), "b": backend.asarray(np.array(1.0))}
    _, said = given(tuner.run, backend.asarray(np.zeros(2)), lam, [None], [None], 4)
    assert sorted("'a'" in str(warning.message) for warning in said) == [False, True]
    assert all(warning.category is hg.errors.ZeroResponseWarning for warning in said)
