"""An unroll gives the training loss of every step, whatever its tape keeps, and a history has them all.

The witness is gradient descent written by hand in NumPy.
"""

import numpy as np
import pytest

import hypergrad as hg

X = np.random.default_rng(0).normal(size=(4, 6, 3))
Y = np.random.default_rng(1).normal(size=(4, 6))
RATE, MOMENTUM, PENALTY = 0.05, 0.9, 0.3
RULE = hg.SGD(RATE, momentum=MOMENTUM)


def by_hand(steps, w=None, velocity=None, penalty=PENALTY):
    """The loss before each of so many steps of momentum SGD."""
    w, velocity, losses = np.zeros(3) if w is None else w, np.zeros(3), []
    for t in range(steps):
        x, y = X[t % 4], Y[t % 4]
        losses.append(np.mean((x @ w - y) ** 2) + penalty * np.sum(w**2))
        velocity = MOMENTUM * velocity + 2 * x.T @ (x @ w - y) / 6 + 2 * penalty * w
        w = w - RATE * velocity
    return np.array(losses)


def task(backend):
    xp = backend.xp
    problem = hg.Bilevel(
        lambda w, h, b: xp.mean((b[0] @ w - b[1]) ** 2) + h * xp.sum(w**2),
        lambda w, h, b: xp.mean((b[0] @ w - b[1]) ** 2),
    )
    batches = [(backend.asarray(x), backend.asarray(y)) for x, y in zip(X, Y, strict=True)]
    return problem, backend.asarray(np.zeros(3)), backend.asarray(np.array(PENALTY)), batches


def in_turn(backend, batches):
    rows = backend.stack(batches)
    return lambda t: backend.take(rows, t % 4)


ESTIMATORS = {
    "full": hg.Unrolled(RULE, 7),
    "states": hg.Unrolled(RULE, 7, tape=hg.States()),
    "binomial": hg.Unrolled(RULE, 7, tape=hg.Binomial(3)),
    "offload": hg.Unrolled(RULE, 7, tape=hg.Offload(hg.States())),
    "reversible": hg.Unrolled(RULE, 7, tape=hg.Reversible()),
    "truncated": hg.Unrolled(RULE, 7, truncate=3, tape=hg.States()),
    "forward": hg.Forward(RULE, 7),
}


@pytest.mark.parametrize("name", ESTIMATORS)
class TestAnEstimate:
    def test_every_step(self, backend, name):
        problem, w, penalty, batches = task(backend)
        state = ESTIMATORS[name].init(problem, w, penalty)
        out = ESTIMATORS[name].estimate(problem, state, penalty, in_turn(backend, batches), batches[0])
        values = backend.to_numpy(out.report.inner_values)
        np.testing.assert_allclose(values, by_hand(7), rtol=1e-12)
        assert values[-1] == float(out.inner_value)


def test_a_run_whose_length_only_its_batches_know(backend):
    problem, w, penalty, batches = task(backend)
    for tape in (hg.Full(), hg.Binomial(3)):
        unrolled = hg.Unrolled(RULE, None, tape=tape)
        state = unrolled.init(problem, w, penalty)
        out = unrolled.estimate(problem, state, penalty, iter([*batches, *batches]), batches[0])
        np.testing.assert_allclose(backend.to_numpy(out.report.inner_values), by_hand(8), rtol=1e-12)


@pytest.mark.parametrize("name", ["full", "binomial", "forward"])
class TestAHistory:
    def test_of_a_run(self, backend, name):
        problem, w, penalty, batches = task(backend)
        frozen = hg.SGD(0.0)  # so that the run by hand needs no λ
        tuner = hg.Tuner(problem, ESTIMATORS[name], hyper_update=frozen, every=7)
        run = tuner.run(w, penalty, batches, batches[0], 21)
        np.testing.assert_allclose(run.history.inner_values, by_hand(21), rtol=1e-12)

    def test_of_recorded_steps(self, backend, name):
        problem, w, penalty, batches = task(backend)
        tuner = hg.Tuner(problem, ESTIMATORS[name], hyper_update=hg.SGD(0.0), every=7)
        state, history = tuner.init(w, penalty), hg.History.start(backend, penalty)
        while len(history.inner_values) < 21:
            state, step = tuner.step(state, in_turn(backend, batches), batches[0])
            history = tuner.record(history, step)
        np.testing.assert_allclose(history.inner_values, by_hand(21), rtol=1e-12)
        assert history.steps.tolist() == [0, 7, 14, 21]


@pytest.mark.parametrize("name", ["full", "binomial"])
def test_a_history_of_plain_steps_and_unrolls(backend, name):
    problem, w, penalty, batches = task(backend)
    tuner = hg.Tuner(problem, ESTIMATORS[name], hyper_update=hg.SGD(0.0), every=10)
    run = tuner.run(w, penalty, batches, batches[0], 23)
    np.testing.assert_allclose(run.history.inner_values, by_hand(23), rtol=1e-12)


def test_starts_again_are_recorded_as_they_were_taken(backend):
    problem, w, penalty, batches = task(backend)
    tuner = hg.Tuner(problem, hg.Unrolled(RULE, 4), hyper_update=hg.SGD(0.0), every=4, restart=True)
    run = tuner.run(w, penalty, batches, batches[0], 8)
    np.testing.assert_allclose(run.history.inner_values, [*by_hand(4), *by_hand(4)], rtol=1e-12)
