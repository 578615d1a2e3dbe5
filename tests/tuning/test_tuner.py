"""`Tuner`: parameters and hyperparameters trained together, logged, saved and resumed."""

import autograd.numpy as anp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import testing
from hypergrad.backend import get_backend
from hypergrad.errors import ArgumentError, CheckpointError, NonFiniteError
from hypergrad.problems.step import Inner, Training
from hypergrad.testing.problems import regression

NUMPY = get_backend("numpy")
RULE = hg.SGD(0.02, momentum=0.9)
PROBLEM, PARAMS, HPARAMS, TRAIN, VAL = regression(NUMPY)


def tuner(estimator=None, **options):
    return hg.Tuner(PROBLEM, estimator or hg.Greedy(RULE), **options)


def run(tuner, steps=25, train=TRAIN, val=VAL, **options):
    return tuner.run(PARAMS, HPARAMS, train, val, steps, **options)


def same(mine, other):
    testing.problems.close(NUMPY, mine, other, 0.0)


class TestTheLoop:
    @pytest.mark.parametrize("every, updates", [(1, 25), (10, 2), (30, 0)])
    def test_hyperparameters_move_once_in_every_steps(self, every, updates):
        done = run(tuner(every=every))
        assert done.history.steps.tolist() == [0, *range(every, 26, every)]
        assert len(done.history.steps) == updates + 1
        assert len(done.history.inner_values) == 25 and done.state.inner.step == 25

    def test_the_steps_between_make_no_validation_pass(self):
        seen = []
        outer = lambda p, h, b: (seen.append(1), PROBLEM.outer(p, h, b))[1]  # noqa: E731
        counted = hg.Tuner(hg.Bilevel(PROBLEM.inner, outer), hg.Greedy(RULE), every=10)
        counted.run(PARAMS, HPARAMS, TRAIN, VAL, 20)
        assert len(seen) == 2

    def test_with_frozen_hyperparameters_it_is_plain_training(self):
        phi, z = Training(NUMPY, PROBLEM, RULE), Inner(PARAMS, RULE.init(NUMPY, PARAMS))
        for t in range(25):
            z, _ = phi.step(z, HPARAMS, TRAIN, t)
        for estimator in (hg.Greedy(RULE), hg.Unrolled(RULE, 5), hg.Unrolled(RULE, 5, tape=hg.States())):
            same(run(tuner(estimator, hyper_update=hg.SGD(0.0), every=5)).params, z.params)

    def test_the_hypergradient_is_chained_through_the_space(self):
        greedy, lr = hg.Greedy(RULE), 0.1
        options = {
            "space": {"log_l2": hg.Real(), "tilt": hg.Positive()},
            "hyper_update": hg.SGD(lr),
            "every": 1,
        }
        state, lam = greedy.init(PROBLEM, PARAMS, HPARAMS), HPARAMS
        for _ in range(5):
            out = greedy.estimate(PROBLEM, state, lam, TRAIN, VAL)
            g, state = out.hypergradient, out.state
            u = np.log(lam["tilt"]) - lr * g["tilt"] * lam["tilt"]
            lam = {"log_l2": lam["log_l2"] - lr * g["log_l2"], "tilt": np.exp(u)}
        testing.problems.close(NUMPY, run(tuner(**options), 5).hparams, lam, 1e-12)

    def test_unrolled_goes_on_or_starts_again(self):
        on = run(tuner(hg.Unrolled(RULE, 5), every=5))
        assert on.state.inner.step == 25
        again = run(tuner(hg.Unrolled(RULE, 5), every=5, restart=True))
        assert again.state.inner.step == 5
        assert again.history.inner_values[0] > on.history.inner_values[-1]

    def test_an_estimator_that_does_not_train_needs_an_update(self):
        implicit = hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=float("inf")))
        done = run(tuner(implicit, update=RULE, every=5))
        assert done.state.inner.step == 25 and len(done.history.steps) == 6
        with pytest.raises(ArgumentError, match="pass update="):
            tuner(implicit)
        with pytest.raises(ArgumentError, match="leave update= out"):
            tuner(update=RULE)
        with pytest.raises(ArgumentError, match="restart"):
            tuner(implicit, update=RULE, restart=True)
        with pytest.raises(ArgumentError, match="every"):
            tuner(every=0)

    def test_a_clip_is_logged(self):
        space = {"log_l2": hg.Real(), "tilt": hg.NonNegative()}
        start = HPARAMS | {"tilt": np.array(1e-3)}
        done = tuner(space=space, hyper_update=hg.SGD(1.0), every=5).run(PARAMS, start, TRAIN, VAL, 25)
        tilts = np.array(done.history.values["hparams['tilt']"])
        assert np.all(tilts >= 0) and sum(done.history.clipped) > 0

    def test_it_runs_on_every_backend(self, backend):
        problem, params, hparams, train, val = regression(backend)
        there = hg.Tuner(problem, hg.Greedy(RULE), every=5).run(params, hparams, train, val, 10)
        here = run(tuner(every=5), 10)
        for mine, other in zip(
            backend.flatten(there.hparams)[0], NUMPY.flatten(here.hparams)[0], strict=True
        ):
            np.testing.assert_allclose(backend.to_numpy(mine), other, rtol=1e-10)

    def test_a_list_starts_again_at_its_end(self):
        batches = [regression(NUMPY)[3], {"x": TRAIN["x"] + 1, "y": TRAIN["y"]}]
        same(run(tuner(), train=batches).params, run(tuner(), train=lambda t: batches[t % 2]).params)

    def test_noise_is_reproducible_from_a_seed(self):
        def inner(p, h, b):
            return PROBLEM.inner(p, h, {"x": b["x"] + 0.1 * np.random.normal(size=b["x"].shape), "y": b["y"]})

        noisy = hg.Tuner(hg.Bilevel(inner, PROBLEM.outer), hg.Greedy(RULE), every=5)
        np.random.seed(3)
        found = np.random.get_state()[1].copy()
        first, second, other = (noisy.run(PARAMS, HPARAMS, TRAIN, VAL, 10, seed=s) for s in (1, 1, 2))
        same(first.params, second.params)
        assert not np.array_equal(first.params["w"], other.params["w"])
        np.testing.assert_array_equal(np.random.get_state()[1], found)

    def test_a_fault_leaves_the_last_state_good(self):
        wrong = lambda t: TRAIN if t < 3 else {"x": TRAIN["x"] * np.nan, "y": TRAIN["y"]}  # noqa: E731
        it = tuner(every=2)
        state = it.init(PARAMS, HPARAMS)
        for _ in range(3):
            state, _ = it.step(state, wrong, VAL)
        with pytest.raises(NonFiniteError) as caught:
            it.step(state, wrong, VAL)
        assert caught.value.step == 3 and caught.value.where == "T1"
        it.step(state, TRAIN, VAL)


class TestHistory:
    def test_costs_add_up(self):
        done = run(tuner(every=10), 20)
        assert done.history.cost.tolist() == [0.0, 13.0, 26.0]
        implicit = hg.Implicit(hg.Identity(), checks=hg.Checks(tolerance=float("inf")))
        assert run(tuner(implicit, update=RULE, every=10), 10).history.cost.tolist() == [0.0, 10.0 + 2 + 2]

    def test_saved_and_loaded(self, tmp_path):
        done = run(tuner(every=5))
        done.history.save(tmp_path / "run.npz")
        assert hg.History.load(tmp_path / "run.npz").arrays().keys() == done.history.arrays().keys()
        for name, column in hg.History.load(tmp_path / "run.npz").arrays().items():
            np.testing.assert_array_equal(column, done.history.arrays()[name])

    def test_large_leaves_are_summarised(self):
        problem = hg.Bilevel(
            lambda p, h, b: anp.sum((p - 1) ** 2) + anp.mean(anp.exp(h)) * anp.sum(p**2),
            lambda p, h, b: anp.sum((p - 1) ** 2),
        )
        done = hg.Tuner(problem, hg.Greedy(hg.SGD(0.1)), every=1).run(
            np.ones(3), np.zeros(2000), None, None, 2
        )
        assert done.history.values["hparams"][0].shape == (3,)

    def test_drawn(self, tmp_path):
        run(tuner(every=5)).history.plot(tmp_path / "run.png")
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    def test_progress_is_shown_when_asked_for(self, capsys, monkeypatch):
        run(tuner(every=5), progress=True)
        monkeypatch.setattr("hypergrad.tuning.progress.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install 'hypergradients\[progress\]'"):
            run(tuner(every=5), progress=True)


class TestResuming:
    def test_is_bit_for_bit(self, tmp_path):
        it = tuner(hg.Greedy(hg.Adam(0.05)), every=10)
        half = run(it, 17)
        it.save(tmp_path / "half.npz", half)
        resumed = run(it, 45, resume=it.load(tmp_path / "half.npz", PARAMS, HPARAMS))
        whole = run(it, 45)
        same((resumed.params, resumed.hparams), (whole.params, whole.hparams))
        for column in ("steps", "cost", "inner_values"):
            np.testing.assert_array_equal(getattr(resumed.history, column), getattr(whole.history, column))

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        it, path = tuner(every=5), tmp_path / "run.npz"
        it.save(path, run(it, 5))
        old = path.read_bytes()
        monkeypatch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            it.save(path, run(it, 10))
        assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]

    def test_what_does_not_fit_is_refused(self, tmp_path):
        it, path = tuner(every=5), tmp_path / "run.npz"
        it.save(path, run(it, 5))
        with pytest.raises(CheckpointError, match=r"params\['v'\]: .*, here nothing"):
            it.load(path, {"w": np.ones(2)}, HPARAMS)
        with pytest.raises(CheckpointError, match=r"float64 .*, here 'float64 \(1, 1\)'"):
            it.load(path, {"w": np.ones((1, 1)), "v": np.ones(2)}, HPARAMS)
        pebble = regression(get_backend("pebble"))
        with pytest.raises(CheckpointError, match="backend: 'numpy', here 'pebble'"):
            it.load(path, pebble[1], pebble[2])
        for damage in (path.read_bytes()[:100], b"no file of numbers", b""):
            path.write_bytes(damage)
            with pytest.raises(CheckpointError, match="damaged"):
                it.load(path, PARAMS, HPARAMS)
        np.savez(path, a=np.array([{}], dtype=object))
        with pytest.raises(CheckpointError):
            hg.History.load(path)


@pytest.mark.parametrize("every", [1, 3])  # an update, and a plain step
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_fault_names_its_own_leaf(backend, every, name):
    xp = backend.xp
    problem = hg.Bilevel(
        lambda p, h, b: sum(xp.sum((x - 1.0) ** 2) for x in p.values()) + h * xp.sqrt(xp.sum(p[name] ** 2)),
        lambda p, h, b: sum(xp.sum(x**2) for x in p.values()),
    )
    tuner = hg.Tuner(problem, hg.Greedy(hg.SGD(0.1)), every=every)
    params = {leaf: backend.asarray(np.full(2, float(leaf != name))) for leaf in "abc"}
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError) as caught:
        tuner.run(params, backend.asarray(np.array(0.5)), [None], [None], 3, progress=False)
    assert (caught.value.path, caught.value.step) == (f"params['{name}']", 0)
