"""`Tuner.tune`, which updates λ and trains nothing, and `Tuner.record`, for loops of one's own."""

import numpy as np
import pytest
from support.frameworks import each_backend
from support.known import Logistic

import hypergrad as hg
from hypergrad.errors import ArgumentError

RATE = 0.05
TUNERS = {
    "greedy": (hg.Greedy(hg.SGD(0.01, momentum=0.9)), {}),
    "greedy-eq-3": (hg.Greedy(hg.Adam(0.01), response="gradient"), {}),
    "implicit": (hg.Implicit(hg.CG(), checks=hg.Checks(away="ignore")), {"update": hg.SGD(0.01)}),
    "implicit-warm": (
        hg.Implicit(hg.Warm(hg.CG()), checks=hg.Checks(away="ignore")),
        {"update": hg.SGD(0.01)},
    ),
}


def at_hand(backend, estimator, options, **more):
    known = Logistic()
    theta, lam = backend.asarray(known.optimum(known.lam) + 0.1), backend.asarray(known.lam)
    tuner = hg.Tuner(known.problem(backend), estimator, hyper_update=hg.SGD(RATE), **options, **more)
    return tuner, known.problem(backend), theta, lam, known.data(backend)


@each_backend
class TestTune:
    @pytest.mark.parametrize(("estimator", "options"), TUNERS.values(), ids=TUNERS)
    def test_it_updates_by_the_hypergradient_and_touches_nothing_else(self, backend, estimator, options):
        tuner, problem, theta, lam, (train, val) = at_hand(backend, estimator, options)
        state, draws = tuner.init(theta, lam), repr(backend.random.state())
        after, step = tuner.tune(state, train, val)
        g = backend.to_numpy(hg.hypergradient(problem, theta, lam, train, val, estimator))
        np.testing.assert_allclose(
            backend.to_numpy(tuner.hparams(after)), backend.to_numpy(lam) - RATE * g, rtol=1e-12
        )
        np.testing.assert_array_equal(backend.to_numpy(after.inner.params), backend.to_numpy(theta))
        before, now = (backend.flatten(s.inner.opt_state)[0] for s in (state, after))
        for x, y in zip(before, now, strict=True):
            np.testing.assert_array_equal(backend.to_numpy(x), backend.to_numpy(y))
        assert int(after.inner.step) == int(state.inner.step) == 0
        assert int(after.updates) == 1 and bool(step.updated) and int(step.trained) == 0
        assert repr(backend.random.state()) == draws

    def test_λ_stays_in_its_space(self, backend):
        tuner, *_, theta, lam, (train, val) = at_hand(backend, *TUNERS["greedy"], space=hg.Positive())
        state = tuner.init(theta, lam)
        for _ in range(3):
            state, step = tuner.tune(state, train, val)
        assert (backend.to_numpy(step.hparams) > 0).all()

    @pytest.mark.parametrize(
        "estimator",
        [hg.Unrolled(hg.SGD(0.1), steps=3), hg.Forward(hg.SGD(0.1), steps=10)],
        ids=["unrolled", "forward"],
    )
    def test_what_needs_training_steps_says_so(self, backend, estimator):
        tuner, *_, theta, lam, (train, val) = at_hand(backend, estimator, {})
        with pytest.raises(ArgumentError, match="takes no training steps"):
            tuner.tune(tuner.init(theta, lam), train, val)


@each_backend
def test_a_history_of_ones_own_loop_is_that_of_a_run(backend):
    tuner, *_, theta, lam, (train, val) = at_hand(backend, *TUNERS["greedy"], every=3)
    run = tuner.run(theta, lam, lambda t: train, lambda k: val, 7)
    state, history = tuner.init(theta, lam), hg.History.start(backend, lam)
    for _ in range(7):
        state, step = tuner.step(state, train, val)
        history = tuner.record(history, step)
    for name, column in run.history.arrays().items():
        np.testing.assert_allclose(history.arrays()[name], column, rtol=1e-12, err_msg=name)
