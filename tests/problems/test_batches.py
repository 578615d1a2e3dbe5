"""How ``train`` and ``val`` are read: one rule, whoever reads them."""

import itertools

import numpy as np
import pytest
from support.arrays import arrays

import hypergrad as hg
from hypergrad.errors import ArgumentError

RNG = np.random.default_rng(4)
DATA = [(RNG.normal(size=(8, 3)), RNG.normal(size=8)) for _ in range(4)]
VAL = (RNG.normal(size=(6, 3)), RNG.normal(size=6))
SGD = hg.SGD(0.1)


class Loader:
    """Batches as a framework's loader hands them out: from the start, whenever it is iterated over."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Case:
    """Ridge regression with a penalty for each feature, on a backend."""

    def __init__(self, backend):
        xp = backend.xp

        def mse(w, b):
            return xp.mean((b[0] @ w - b[1]) ** 2)

        self.problem = hg.Bilevel(
            lambda w, h, b: mse(w, b) + xp.sum(xp.exp(h) * w**2), lambda w, h, b: mse(w, b)
        )
        self.data, self.val = [arrays(backend, *b) for b in DATA], arrays(backend, *VAL)
        self.w, self.lam = arrays(backend, np.array([0.3, -0.2, 0.5]), np.array([-1.0, -2.0, -1.5]))
        self.backend = backend

    def estimate(self, estimator, train, val=None):
        g = hg.hypergradient(
            self.problem, self.w, self.lam, train, self.val if val is None else val, estimator
        )
        return self.backend.to_numpy(g)

    def tuned(self, estimator, train, val=None, steps=9):
        tuner = hg.Tuner(self.problem, estimator, hyper_update=hg.SGD(1.0), every=3)
        run = tuner.run(self.w, self.lam, train, self.val if val is None else val, steps, progress=False)
        return self.backend.to_numpy(run.hparams)


@pytest.fixture
def case(backend):
    return Case(backend)


ESTIMATORS = {
    "greedy": (hg.Greedy(SGD), 1),
    "full": (hg.Unrolled(SGD, 3), 3),
    "states": (hg.Unrolled(SGD, 3, tape=hg.States()), 3),
    "binomial": (hg.Unrolled(SGD, 3, tape=hg.Binomial(2)), 3),
    "forward": (hg.Forward(SGD, 3), 3),
}
each_estimator = pytest.mark.parametrize(("estimator", "steps"), ESTIMATORS.values(), ids=ESTIMATORS)
IMPLICIT = hg.Implicit(checks=hg.Checks(away="ignore"))
EVERY = {name: estimator for name, (estimator, _) in ESTIMATORS.items()} | {"implicit": IMPLICIT}


@each_estimator
def test_lists_loaders_iterators_and_functions_agree(case, estimator, steps):
    data = case.data
    rows = case.backend.stack(data)
    expected = case.estimate(estimator, lambda t: case.backend.take(rows, t))
    for train in (data, Loader(data), iter(data), (b for b in data)):
        np.testing.assert_array_equal(case.estimate(estimator, train), expected)
    assert not np.allclose(case.estimate(estimator, data[1:] + data[:1]), expected)


@each_estimator
def test_one_batch_serves_every_step(case, estimator, steps):
    one = case.data[0]
    expected = case.estimate(estimator, [one] * steps)
    for batch in (one, lambda t: one):
        np.testing.assert_array_equal(case.estimate(estimator, batch), expected)


def test_implicit_averages_over_a_list_and_takes_one_batch_of_anything_else(case):
    first = case.estimate(IMPLICIT, case.data[0])
    for train in (Loader(case.data), iter(case.data), lambda t: case.data[0]):
        np.testing.assert_array_equal(case.estimate(IMPLICIT, train), first)
    assert not np.allclose(case.estimate(IMPLICIT, case.data), first)


@pytest.mark.parametrize(
    "estimator", [*(e for e, _ in ESTIMATORS.values()), IMPLICIT], ids=[*ESTIMATORS, "implicit"]
)
def test_a_list_of_bare_arrays_is_refused(case, estimator):
    pair = list(case.data[0])
    with pytest.raises(ArgumentError, match=r"train .*tuple\(batch\).*lambda t: batches\[t\]"):
        case.estimate(estimator, pair)
    with pytest.raises(ArgumentError, match=r"val .*tuple\(batch\)"):
        case.estimate(estimator, lambda t: case.data[0], list(case.val))
    case.estimate(estimator, tuple(pair), tuple(case.val))


def test_every_reader_refuses_a_list_of_bare_arrays(case):
    pair, problem = list(case.data[0]), case.problem
    tuner = hg.Tuner(problem, hg.Greedy(SGD), every=1)
    state, implicit = tuner.init(case.w, case.lam), hg.Tuner(problem, IMPLICIT, update=SGD, every=1)
    for call in (
        lambda: hg.check_hypergradient(problem, case.w, case.lam, pair, case.val, hg.Greedy(SGD)),
        lambda: tuner.run(case.w, case.lam, pair, case.val, 1, progress=False),
        lambda: tuner.run(case.w, case.lam, tuple(pair), list(case.val), 1, progress=False),
        lambda: tuner.step(state, pair, case.val),
        lambda: tuner.tune(state, pair, case.val),
        lambda: implicit.tune(implicit.init(case.w, case.lam), pair, case.val),
        lambda: hg.adjoint(problem, case.w, case.lam, pair, case.val),
    ):
        with pytest.raises(ArgumentError, match=r"tuple\(batch\)"):
            call()


@pytest.mark.parametrize("made", [iter, Loader])
def test_a_check_reads_an_iterator_of_bare_arrays_several_times(case, made):
    xp = case.backend.xp
    problem = hg.Bilevel(
        lambda w, h, b: xp.sum((w - b) ** 2 + h * w**2), lambda w, h, b: xp.sum((w - b) ** 2)
    )
    rows = [x[0] for x, _ in case.data]
    check = hg.check_hypergradient(problem, case.w, case.lam, made(rows), rows[0], hg.Unrolled(SGD, 3))
    assert check.relative_error < 1e-8


def test_functions_of_bare_arrays_are_no_list(case):
    xp = case.backend.xp
    problem = hg.Bilevel(
        lambda w, h, b: xp.sum((w - b) ** 2 + h * w**2), lambda w, h, b: xp.sum((w - b) ** 2)
    )
    rows = [x[0] for x, _ in case.data]
    tuner = hg.Tuner(problem, hg.Unrolled(SGD, 2, tape=hg.States()), every=2)
    state, step = tuner.step(tuner.init(case.w, case.lam), lambda t: rows[t], rows[0])
    estimated = hg.hypergradient(problem, case.w, case.lam, iter(rows), rows[0], hg.Unrolled(SGD, 2))
    np.testing.assert_allclose(
        case.backend.to_numpy(step.estimate.hypergradient), case.backend.to_numpy(estimated), rtol=1e-12
    )


@each_estimator
def test_a_run_reads_every_batch_once_and_replays_the_same(case, estimator, steps):
    """The tapes that replay once drew the iterator's next batches for it."""
    data = case.data
    expected = case.tuned(estimator, data)
    np.testing.assert_allclose(case.tuned(estimator, itertools.cycle(data)), expected, rtol=1e-12)
    np.testing.assert_allclose(case.tuned(estimator, Loader(data), Loader([case.val])), expected, rtol=1e-12)


def test_an_unused_hyperparameter_takes_no_batch(case):
    """To find out whether C̃1 uses it, C̃1 is evaluated once more, on a batch that was read already."""
    left, problem = iter(case.data), case.problem
    unused = hg.Bilevel(lambda w, h, b: problem.inner(w, h[0], b), lambda w, h, b: problem.outer(w, h[0], b))
    for estimator, steps in ESTIMATORS.values():
        left = iter(case.data)
        with pytest.raises(hg.errors.DisconnectedError):
            hg.hypergradient(unused, case.w, (case.lam, case.lam), left, case.val, estimator)
        assert len(list(left)) == 4 - steps


@pytest.mark.parametrize("made", [list, iter, Loader])
def test_too_few_batches_are_named(case, made):
    with pytest.raises(ArgumentError, match=r"train \(T1\) is empty"):
        case.estimate(hg.Unrolled(SGD, 3), made([]))
    with pytest.raises(ArgumentError, match=r"train \(T1\) .*needed: 3, left: 2"):
        case.estimate(hg.Unrolled(SGD, 3), made(case.data[:2]))


def test_an_unroll_to_the_end_of_a_loader(case):
    expected = case.estimate(hg.Unrolled(SGD, 4), case.data)
    for tape in (hg.Full(), hg.States(), hg.Binomial(2)):
        found = case.estimate(hg.Unrolled(SGD, None, tape=tape), Loader(case.data))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
