"""Checkpoints: a run that is read is the run that was written, or a `CheckpointError` lists what differs."""

import json

import numpy as np
import pytest
from support.frameworks import each_backend

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.errors import CheckpointError, CheckpointWarning, DamagedFileError
from hypergrad.tuning.described import described
from hypergrad.tuning.files import write_arrays
from hypergrad.tuning.saved import written

numpy = get_backend("numpy")


def problem_of(backend):
    def mse(w, b):
        return backend.xp.mean((b["x"] @ w - b["y"]) ** 2)

    return hg.Bilevel(
        lambda w, h, b: mse(w["w"], b) + h["l2"] * backend.xp.sum(w["w"] ** 2), lambda w, h, b: mse(w["w"], b)
    )


def tuner_of(backend, **changed):
    recipe = {"estimator": hg.Greedy(hg.Adam(0.05)), "space": hg.Positive(), "every": 2}
    return hg.Tuner(problem_of(backend), **(recipe | changed))


def given(backend):
    x, y = np.random.default_rng(3).normal(size=(8, 3)), np.random.default_rng(4).normal(size=8)
    batch = {"x": backend.asarray(x), "y": backend.asarray(y)}
    return {"w": backend.asarray(np.zeros(3))}, {"l2": backend.asarray(np.array(0.3))}, [batch], [batch]


def run_of(backend, steps=7, resume=None, **changed):
    return tuner_of(backend, **changed).run(*given(backend), steps, progress=False, resume=resume)


def same(mine, other):
    return all(
        np.array_equal(column, other.arrays()[name], equal_nan=True) for name, column in mine.arrays().items()
    )


class TestARunThatIsRead:
    @each_backend
    def test_goes_on_bit_for_bit(self, backend, tmp_path):
        tuner, (params, hparams, *_), whole = tuner_of(backend), given(backend), run_of(backend, 12)
        tuner.save(tmp_path / "run.npz", run_of(backend, 7))
        resumed = run_of(backend, 12, tuner.load(tmp_path / "run.npz", params, hparams))
        assert same(resumed.history, whole.history)

    @each_backend
    def test_comes_from_a_dict_of_arrays_too(self, backend):
        tuner, (params, hparams, *_), run = tuner_of(backend), given(backend), run_of(backend, 7)
        stored = tuner.state_dict(run)
        assert all(type(x) is np.ndarray for x in stored.values())
        state, history = tuner.from_state_dict(dict(reversed(stored.items())), params, hparams)
        assert same(history, run.history) and int(state.inner.step) == 7
        with pytest.raises(DamagedFileError):
            tuner.from_state_dict(stored | {"state.since": np.array(0)}, params, hparams)

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_keeps_half_precision(self, name, tmp_path):
        backend = pytest.importorskip(name) and get_backend(name)
        dtype = backend.xp.bfloat16
        params, hparams, batches, val = backend.map(
            lambda x: backend.xp.asarray(x, dtype=dtype), given(backend)
        )
        tuner = tuner_of(backend)
        run = tuner.run(params, hparams, batches, val, 5, progress=False)
        tuner.save(tmp_path / "run.npz", run)
        state, history = tuner.load(tmp_path / "run.npz", params, hparams)
        assert state.free["l2"].dtype == dtype and float(state.free["l2"]) == float(run.state.free["l2"])
        assert history.values["hparams['l2']"].dtype == np.float32
        wider = backend.map(lambda x: backend.xp.asarray(x, dtype=backend.xp.float32), (params, hparams))
        with pytest.raises(CheckpointError, match=r"'bfloat16 \(3,\)', here 'float32 \(3,\)'"):
            tuner.load(tmp_path / "run.npz", *wider)


class TestAnotherRecipe:
    CHANGES = {
        "a space": ({"space": hg.Real()}, "recipe.space.type: 'Positive', here 'Real'"),
        "its link": ({"space": hg.Positive("softplus")}, "recipe.space.link: 'exp', here 'softplus'"),
        "a tree of spaces": (
            {"space": {"l2": hg.Positive()}},
            "recipe.space.l2.type: nothing, here 'Positive'",
        ),
        "a rate": ({"estimator": hg.Greedy(hg.Adam(0.1))}, "recipe.estimator.update.lr: 0.05, here 0.1"),
        "an estimator": (
            {"estimator": hg.Unrolled(hg.Adam(0.05), steps=2)},
            "recipe.estimator.type: 'Greedy', here 'Unrolled'",
        ),
        "every": ({"every": 4}, "recipe.every: 2, here 4"),
    }

    @pytest.fixture
    def path(self, tmp_path):
        tuner_of(numpy).save(tmp_path / "run.npz", run_of(numpy))
        return tmp_path / "run.npz"

    @pytest.mark.parametrize("change", CHANGES)
    def test_is_refused_with_every_difference(self, path, change):
        changed, line = self.CHANGES[change]
        with pytest.raises(CheckpointError) as caught:
            tuner_of(numpy, **changed).load(path, *given(numpy)[:2])
        assert line in str(caught.value) and "with its own one" in str(caught.value)

    def test_lists_differences_of_several_kinds(self, path):
        params, hparams, *_ = given(numpy)
        with pytest.raises(CheckpointError) as caught:
            tuner_of(numpy, every=3).load(path, *numpy.map(np.float32, (params, hparams)))
        message = str(caught.value)
        assert "recipe.every" in message and "here 'float32 (3,)'" in message and "float32 ()" in message
        assert f"this is {hg.__version__}" in message

    def test_can_go_on_from_the_state_that_its_own_one_read(self, path):
        resume = tuner_of(numpy).load(path, *given(numpy)[:2])
        assert len(run_of(numpy, 9, resume, every=3).history.inner_values) == 9


class TestDescriptions:
    def test_arrays_are_compared_by_their_values(self):
        small, large = np.array([0.1, 3.0], np.float32), np.arange(100.0)
        assert described(numpy, small) == "float32 [0.1 3. ]"
        assert described(numpy, large) == described(numpy, large.copy()) != described(numpy, large + 1)

    def test_what_no_json_has(self):
        assert described(numpy, [float("inf"), len, object(), hg.errors.Failure.SINGULAR, (1, None)]) == {
            "0": "inf",
            "1": "a function",
            "2": "object",
            "3": "SINGULAR",
            "4": {"0": 1, "1": None},
        }


class TestCrafted:
    """Files with a right digest whose content no tuner wrote."""

    @pytest.fixture
    def parts(self):
        return written(tuner_of(numpy).recipe, numpy, run_of(numpy))

    def refuses(self, tmp_path, head, arrays, words=None):
        write_arrays(tmp_path / "run.npz", head, arrays)
        with pytest.raises(CheckpointError, match=words):
            tuner_of(numpy).load(tmp_path / "run.npz", *given(numpy)[:2])

    @pytest.mark.parametrize(
        "name, value, words",
        [
            ("state.since", np.array(-1), "at least 0"),
            ("state.inner.step", np.array(-7), "at least 0"),
            ("state.updates", np.array(2.0), "is not the array"),
            ("state.inner.params['w']", np.zeros(4), "is not the array"),
            ("state.inner.params['w']", np.zeros(3, np.float32), "float32"),
            ("state.inner.params['w']", np.zeros(3, ">f8"), ">f8"),
            ("state.free['l2']", np.array("0.3"), "is not the array"),
            ("state.more", np.zeros(3), "more"),
            ("history:clipped", np.zeros(3, int), "clipped"),
            ("history:value:hparams['l2']", np.zeros((9, 2)), "l2"),
            ("history:value:another", np.zeros(9), "another"),
            ("history:outer_values", np.array(["a"] * 4), "outer_values"),
            ("history:steps", np.array([0, 4, 2, 6]), "steps"),
            ("history:steps", np.array([0, 2, 4, 60]), "fewer losses"),
            ("history:more", np.zeros(4), "more"),
        ],
    )
    def test_an_array(self, parts, tmp_path, name, value, words):
        head, arrays = parts
        self.refuses(tmp_path, head, arrays | {name: value}, words)

    @pytest.mark.parametrize(
        "name", ["state.since", "state.free['l2']", "history:cost", "history:report:products"]
    )
    def test_an_array_that_is_missing(self, parts, tmp_path, name):
        head, arrays = parts
        del arrays[name]
        self.refuses(tmp_path, head, arrays)

    @pytest.mark.parametrize(
        "head", [{}, [], 3, {"format": 2}, {"format": 1}, {"format": 1, "leaves": [[[]]]}, {"format": "1"}]
    )
    def test_a_head(self, parts, tmp_path, head):
        self.refuses(tmp_path, head, parts[1])

    def test_a_head_of_another_format_says_so(self, parts, tmp_path):
        head, arrays = parts
        self.refuses(tmp_path, head | {"format": 2}, arrays, "format 2, and this version reads format 1")

    def test_another_version_of_the_library_is_read(self, parts, tmp_path):
        head, arrays = parts
        write_arrays(tmp_path / "run.npz", head | {"library": "99.0"}, arrays)
        tuner_of(numpy).load(tmp_path / "run.npz", *given(numpy)[:2])

    def test_the_head_is_json_that_numpy_reads(self, tmp_path):
        tuner_of(numpy).save(tmp_path / "run.npz", run_of(numpy))
        with np.load(tmp_path / "run.npz") as stored:
            head = json.loads(stored["head"].tobytes())
        assert head["library"] == hg.__version__ and head["backend"] == "numpy"
        assert head["leaves"]["state.inner.params['w']"] == "float64 (3,)"
        assert head["recipe"]["problem"]["inner"] == "a function"


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        return tmp_path / "runs" / "first"

    def load(self, folder):
        return tuner_of(numpy).load_latest(folder, *given(numpy)[:2])

    def names(self, folder):
        return sorted(file.name for file in folder.iterdir())

    def test_keeps_the_newest_by_step(self, folder):
        for steps in (2, 4, 8):
            tuner_of(numpy).save(folder, run_of(numpy, steps), keep=2)
        assert self.names(folder) == ["step-000000004.npz", "step-000000008.npz"]
        assert len(self.load(folder)[1].inner_values) == 8

    def test_does_not_touch_a_run_that_is_further(self, folder):
        tuner_of(numpy).save(folder, run_of(numpy, 8), keep=2)
        with pytest.raises(CheckpointError, match="up to step 8, and this run is at step 6"):
            tuner_of(numpy).save(folder, run_of(numpy, 6), keep=2)
        steps = []
        with pytest.raises(CheckpointError, match="at step 0"):
            params, hparams, train, val = given(numpy)
            called = lambda t: steps.append(t) or train[0]  # noqa: E731
            tuner_of(numpy).run(params, hparams, called, val, 12, save_to=folder, keep=2, progress=False)
        assert not steps and self.names(folder) == ["step-000000008.npz"]

    def test_a_run_saves_on_its_way(self, folder):
        tuner_of(numpy).run(*given(numpy), 12, save_to=folder, save_every=3, keep=3, progress=False)
        assert self.names(folder) == [f"step-{k:09d}.npz" for k in (6, 9, 12)]
        assert len(self.load(folder)[1].inner_values) == 12

    def test_passes_over_a_damaged_file_with_a_warning(self, folder):
        for steps in (4, 6):
            tuner_of(numpy).save(folder, run_of(numpy, steps), keep=2)
        (folder / "step-000000006.npz").write_bytes(b"")
        with pytest.warns(CheckpointWarning, match="step-000000006"):
            assert len(self.load(folder)[1].inner_values) == 4
        (folder / "step-000000004.npz").write_bytes(b"")
        with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="every checkpoint"):
            self.load(folder)

    def test_does_not_pass_over_another_run(self, folder):
        tuner_of(numpy).save(folder, run_of(numpy, 4), keep=2)
        tuner_of(numpy, every=3).save(folder, run_of(numpy, 6, every=3), keep=2)
        with pytest.raises(CheckpointError, match="every"):
            self.load(folder)

    def test_leaves_other_files_alone(self, folder):
        folder.mkdir(parents=True)
        (folder / "step-1.npz").touch()
        (folder / "notes.txt").touch()
        tuner_of(numpy).save(folder, run_of(numpy, 4), keep=1)
        assert self.names(folder) == ["notes.txt", "step-000000004.npz", "step-1.npz"]

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            self.load(tmp_path)

    @pytest.mark.parametrize("keep", [0, -1, 1.5, True])
    def test_a_number_of_files_that_is_none(self, folder, keep):
        with pytest.raises(hg.errors.ArgumentError, match="keep"):
            tuner_of(numpy).save(folder, run_of(numpy, 4), keep=keep)
