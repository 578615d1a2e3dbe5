"""What a run leaves behind when it ends with an error, and what it saves on the way."""

import numpy as np
import pytest
from support.frameworks import each, each_backend

import hypergrad as hg
from hypergrad import errors

X, Y = np.random.default_rng(3).normal(size=(8, 3)), np.random.default_rng(4).normal(size=8)
STEPS, EVERY, FAULT = 40, 2, 31


def tuner_of(backend):
    xp = backend.xp

    def mse(w, b):
        return xp.mean((b["x"] @ w - b["y"]) ** 2)

    problem = hg.Bilevel(lambda w, h, b: mse(w, b) + xp.exp(h) * xp.sum(w**2), lambda w, h, b: mse(w, b))
    return hg.Tuner(problem, hg.Greedy(hg.SGD(0.05, momentum=0.9)), every=EVERY)


def given(backend, fault=FAULT):
    x, y, w, h = (backend.asarray(v, like=None) for v in (X, Y, np.zeros(3), np.array(-2.0)))
    nan = backend.asarray(np.full(8, np.nan), like=None)
    fine = {"x": x, "y": y}
    train = lambda t: {"x": x, "y": backend.xp.where(t == fault, nan, y) if t is not fault else nan}  # noqa: E731
    return w, h, train, fine


def interrupted(backend, train, **options):
    w, h, _, val = given(backend)
    with pytest.raises(errors.NonFiniteError) as caught:
        tuner_of(backend).run(w, h, train, val, STEPS, progress=False, **options)
    return caught.value.run


@each("numpy", "torch")
@pytest.mark.parametrize("as_iterator", [False, True])
def test_the_error_has_the_run_before_it(backend, as_iterator):
    w, h, train, val = given(backend, fault=-1)
    whole = tuner_of(backend).run(w, h, train, val, STEPS, progress=False)
    broken = given(backend)[2]
    run = interrupted(backend, (broken(t) for t in range(STEPS)) if as_iterator else broken)
    rows = FAULT // EVERY + 1
    assert len(run.history.steps) == rows and len(run.history.inner_values) == (rows - 1) * EVERY
    np.testing.assert_array_equal(run.history.outer_values, whole.history.outer_values[:rows])
    again = tuner_of(backend).run(w, h, train, val, STEPS, progress=False, resume=(run.state, run.history))
    np.testing.assert_array_equal(again.history.outer_values, whole.history.outer_values)
    np.testing.assert_array_equal(again.history.inner_values, whole.history.inner_values)


@each("jax")
def test_a_compiled_run_has_its_history_too(backend):
    run = interrupted(backend, given(backend)[2])
    assert len(run.history.steps) >= FAULT // EVERY
    assert np.isfinite(run.history.outer_values[1 : FAULT // EVERY]).all()


@each_backend
def test_a_run_that_saves_on_the_way_is_the_same_run(backend, tmp_path):
    w, h, train, val = given(backend, fault=-1)
    plain = tuner_of(backend).run(w, h, train, val, STEPS, progress=False)
    path = tmp_path / "run.npz"
    saving = tuner_of(backend).run(w, h, train, val, STEPS, progress=False, save_to=path, save_every=14)
    tight = {"rtol": 1e-12} if backend.name == "jax" else {"rtol": 0}
    np.testing.assert_allclose(saving.history.outer_values, plain.history.outer_values, **tight)
    _, history = tuner_of(backend).load(path, w, h)
    np.testing.assert_array_equal(history.steps, saving.history.steps)


@each("numpy", "torch")
def test_what_was_saved_survives_the_fault(backend, tmp_path):
    path = tmp_path / "run.npz"
    interrupted(backend, given(backend)[2], save_to=path, save_every=10)
    state, history = tuner_of(backend).load(path, *given(backend)[:2])
    assert len(history.inner_values) == 30 and int(state.updates) == 15


def test_save_every_needs_a_file():
    numpy = hg.backend.get_backend("numpy")
    w, h, train, val = given(numpy)
    with pytest.raises(errors.ArgumentError, match="save_to"):
        tuner_of(numpy).run(w, h, train, val, STEPS, save_every=3)
