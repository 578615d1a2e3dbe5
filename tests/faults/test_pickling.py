"""Errors and warnings travel between processes as themselves."""

import inspect
import multiprocessing
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import errors

MADE = [
    errors.DisconnectedError("nothing depends on it", "hparams['x']"),
    errors.NonFiniteError("T1", 7, "params['w']"),
    errors.NonFiniteError("T2", 3),
    errors.SolveError("too few", errors.Failure.MAX_STEPS, 5, 0.25),
    errors.ReplayError("it ended elsewhere", 4),
    errors.FixedPointError("params['w']"),
    errors.FixedPointError(None, log=True),
    errors.DifferenceError(0.5, 0.01),
    errors.InnerNotConvergedError(2.0, 1e-3),
]
PLAIN = [
    kind("said in words")
    for kind in vars(errors).values()
    if inspect.isclass(kind)
    and issubclass(kind, errors.HypergradError | errors.HypergradWarning)
    and kind not in {type(error) for error in MADE}
]


@pytest.mark.parametrize("error", [*MADE, *PLAIN], ids=lambda error: type(error).__name__)
def test_each_comes_back_as_itself(error):
    error.__notes__ = ["in worker 3"]
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and back.args == error.args
    assert vars(back) == vars(error)


def test_every_class_is_tried():
    kinds = {type(error) for error in MADE} | {type(error) for error in PLAIN}
    assert len(kinds) >= 20 and errors.HypergradError in kinds and errors.SolveWarning in kinds


def test_what_a_run_had_done_comes_along():
    problem = hg.Bilevel(lambda w, h, b: (h * w**2).sum() / b, lambda w, h, b: (w**2).sum())
    tuner = hg.Tuner(problem, hg.Greedy(hg.SGD(0.1)), every=1)
    with np.errstate(all="ignore"), pytest.raises(errors.NonFiniteError) as caught:
        tuner.run(
            np.ones(2), np.array(0.1), lambda t: 1.0 if t < 3 else np.array(0.0), [None], 6, progress=False
        )
    back = pickle.loads(pickle.dumps(caught.value))
    assert len(back.run.history.steps) == 4
    np.testing.assert_array_equal(back.run.params, caught.value.run.params)


def fails(k):
    problem = hg.Bilevel(
        lambda w, h, b: ((w - 1) ** 2).sum() * 0.0 - h * (w**2).sum(), lambda w, h, b: w.sum()
    )
    return hg.hypergradient(problem, np.ones(2), np.array(0.1 * k), None, None, hg.Implicit(hg.CG()))


def warns(k):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hg.errors.warn(f"number {k}", errors.SolveWarning)
    return said[0].message


def test_out_of_a_pool():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(errors.SolveError) as caught:
            pool.submit(fails, 1).result(timeout=120)
        assert caught.value.reason == "negative_curvature" and "not positive definite" in str(caught.value)
        message = pool.submit(warns, 2).result(timeout=120)
        assert type(message) is errors.SolveWarning and str(message) == "number 2"
