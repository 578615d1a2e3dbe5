"""Estimates in several threads."""

import itertools
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from support.faults import CHEAP, ESTIMATORS, estimate, strengths
from support.frameworks import affordable
from support.installed import torch

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.backend.turns import turns

RULE = hg.SGD(0.05)
REPLAYING = {
    "states": hg.Unrolled(RULE, 6, tape=hg.States()),
    "binomial": hg.Unrolled(RULE, 6, tape=hg.Binomial(2)),
    "differences": hg.Greedy(RULE, products=hg.FiniteDifference()),
    "full": hg.Unrolled(RULE, 6),
}


class TestThreads:
    def test_are_independent(self, backend):
        many = affordable(backend, (ESTIMATORS, range(10)), (CHEAP, range(2)))
        cases = list(itertools.product(*many))
        shifted = lambda k: {"x": strengths()["x"] + 0.1 * k}  # noqa: E731
        one = lambda case: estimate(backend, case[0], hparams=shifted(case[1])).hypergradient["x"]  # noqa: E731
        one(cases[0])  # what a framework imports when it is first used may add filters of its own
        filters = list(warnings.filters)
        serial = [one(case) for case in cases]
        with ThreadPoolExecutor(8) as pool:
            assert_array_equal(list(pool.map(one, cases)), serial)
        assert list(warnings.filters) == filters


def noisy(name, log=None):
    """Losses with noise of the framework's own generator, which may note every draw in a list."""
    backend = get_backend(name)
    xp = backend.xp
    draw = (lambda: np.random.normal()) if name == "numpy" else lambda: torch.randn((), dtype=torch.float64)

    def inner(w, h, _):
        noise = draw()
        if log is not None:
            log.append(float(noise))
        time.sleep(1e-4)  # so that threads change places
        return xp.sum((w * (1.0 + 0.3 * noise) - 1.0) ** 2) + h * xp.sum(w**2)

    return backend, hg.Bilevel(inner, lambda w, h, _: xp.sum((w - 2.0) ** 2))


def by_hand(draws, lam, w):
    """dC2/dλ of gradient descent with these draws, by forward differentiation."""
    slope = np.zeros_like(w)
    for e in draws:
        s = 1.0 + 0.3 * e
        slope = slope - 0.05 * (2 * s * s * slope + 2 * lam * slope + 2 * w)
        w = w - 0.05 * (2 * s * (w * s - 1.0) + 2 * lam * w)
    return np.sum(2 * (w - 2.0) * slope)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("estimator", REPLAYING.values(), ids=REPLAYING)
def test_noise_is_replayed_whatever_other_threads_draw(name, estimator):
    if name == "torch":
        pytest.importorskip("torch")

    def one(k):
        log = []
        backend, problem = noisy(name, log)
        w, lam = backend.asarray(np.array([1.0, -0.5])), backend.asarray(np.array(0.1 + 0.01 * k))
        found = hg.hypergradient(problem, w, lam, None, None, estimator)
        return float(found), by_hand(log[: estimator.training_steps], 0.1 + 0.01 * k, np.array([1.0, -0.5]))

    with ThreadPoolExecutor(8) as pool:
        found, expected = np.array(list(pool.map(one, range(80)))).T
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def together(problem, count=2):
    """At most how many threads are in a loss of this problem at once?"""
    inside, most, lock = [0], [0], threading.Lock()

    def inner(w, h, b):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with lock:
            inside[0] -= 1
        return problem.inner(w, h, b)

    watched = hg.Bilevel(inner, problem.outer)
    one = lambda _: hg.hypergradient(watched, np.ones(2), np.array(0.1), None, None, hg.Greedy(RULE))  # noqa: E731
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(6)))
        most[0] = 0
        list(pool.map(one, range(6)))
    return most[0]


def quiet(w, h, _):
    return ((w - 1.0) ** 2).sum() + h * (w**2).sum()


def test_estimates_that_draw_run_one_after_the_other():
    assert together(noisy("numpy")[1]) == 1


def test_estimates_that_do_not_draw_run_side_by_side():
    assert together(hg.Bilevel(quiet, lambda w, h, _: (w**2).sum())) == 2


def test_what_a_seeded_run_draws_is_not_hidden_by_its_end():
    _, problem = noisy("numpy")
    tuner = hg.Tuner(problem, hg.Greedy(RULE), every=1)
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(
                lambda _: tuner.run(np.ones(2), np.array(0.1), [None], [None], 5, seed=3, progress=False),
                range(8),
            )
        )
    assert not turns._is_quiet(problem)
    for run in runs:
        assert_array_equal(run.params, runs[0].params)


def test_a_thread_may_estimate_inside_of_a_loss():
    inside = hg.Bilevel(quiet, lambda w, h, _: (w**2).sum())

    def inner(w, h, b):
        hg.hypergradient(inside, np.ones(2), np.array(0.1), None, None, hg.Greedy(RULE))
        return quiet(w, h, b)

    problem = hg.Bilevel(inner, inside.outer)
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(hg.hypergradient, problem, np.ones(2), np.array(0.1), None, None, hg.Greedy(RULE))
            for _ in range(8)
        ]
        assert len({float(call.result(timeout=60)) for call in calls}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_does_not_wait_for_a_thread_of_its_parent():
    inside, leave = threading.Event(), threading.Event()

    def inner(w, h, b):
        inside.set()
        leave.wait(60)
        return quiet(w, h, b)

    one = lambda f: hg.hypergradient(  # noqa: E731
        hg.Bilevel(f, lambda w, h, _: (w**2).sum()), np.ones(2), np.array(0.1), None, None, hg.Greedy(RULE)
    )
    thread = threading.Thread(target=one, args=(inner,))
    thread.start()
    inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads, which is what is tried here
        child = os.fork()
    if not child:
        one(quiet)
        os._exit(0)
    for _ in range(600):
        if ended := os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
    leave.set()
    thread.join()
    assert ended == child


def test_an_error_ends_its_turn():
    def fails(w, h, _):
        raise ZeroDivisionError

    problem = hg.Bilevel(fails, lambda w, h, _: (w**2).sum())
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(hg.hypergradient, problem, np.ones(2), np.array(0.1), None, None, hg.Greedy(RULE))
            for _ in range(8)
        ]
        for call in calls:
            with pytest.raises(ZeroDivisionError):
                call.result(timeout=60)
