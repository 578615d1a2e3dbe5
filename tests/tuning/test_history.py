"""`History`: what it notes of a run, in files that are whole or not there, and in a picture."""

import io
import os
from dataclasses import replace

import autograd.numpy as anp
import numpy as np
import pytest
from matplotlib.figure import Figure

import hypergrad as hg
from hypergrad.backend import get_backend, vectors
from hypergrad.errors import CheckpointError
from hypergrad.testing.problems import regression
from hypergrad.tuning.history import LARGEST_LEAF

RULE = hg.SGD(0.02, momentum=0.9)


def history(backend=None, steps=25, every=10, **options):
    problem, params, hparams, train, val = regression(backend or get_backend("numpy"))
    return hg.Tuner(problem, hg.Greedy(RULE), every=every, **options).run(params, hparams, train, val, steps)


def equal(mine, other):
    """Bit for bit, NaNs included."""
    mine, other = mine.arrays(), other.arrays()
    assert mine.keys() == other.keys()
    for name, column in mine.items():
        np.testing.assert_array_equal(column, other[name])


def full_disk(file, **arrays):
    file.write(b"PK half a file")
    raise OSError("no space left on device")


class TestRows:
    def test_one_for_the_start_and_one_for_each_update(self, backend):
        kept = history(backend).history
        assert kept.steps.tolist() == [0, 10, 20] and len(kept.inner_values) == 25
        for rows in (*kept.values.values(), *kept.reports.values(), kept.outer_values, kept.clipped):
            assert len(rows) == 3

    def test_the_start_is_lambda_before_any_estimate(self, backend):
        kept, start = history(backend).history, regression(backend)[2]
        np.testing.assert_array_equal(kept.values["hparams['log_l2']"][0], backend.to_numpy(start["log_l2"]))
        assert kept.cost[0] == 0 and kept.clipped[0] == 0
        assert np.isnan(
            [kept.outer_values[0], kept.hypergradient_norms[0], kept.reports["direct_norm"][0]]
        ).all()

    def test_the_last_row_is_how_the_run_ended(self, backend):
        done = history(backend)
        for path, leaf in zip(
            backend.paths(done.hparams, "hparams"), backend.flatten(done.hparams)[0], strict=True
        ):
            np.testing.assert_array_equal(done.history.values[path][-1], backend.to_numpy(leaf))

    def test_a_row_is_what_the_estimate_said(self, backend):
        problem, params, hparams, train, val = regression(backend)
        tuner = hg.Tuner(problem, hg.Greedy(RULE), every=1)
        _, step = tuner.step(tuner.init(params, hparams), train, val)
        kept, out = tuner.run(params, hparams, train, val, 1).history, step.estimate
        assert kept.outer_values[1] == float(out.outer_value)
        assert kept.inner_values.tolist() == [float(out.inner_value)]
        norm = backend.to_numpy(vectors.norm(backend, out.hypergradient))
        assert kept.hypergradient_norms[1] == float(norm)
        for name, rows in kept.reports.items():
            np.testing.assert_equal(rows[1], float(out.report.columns()[name]))
        assert kept.cost.tolist() == [0.0, float(out.report.cost)]

    def test_ten_steps_cost_nine_gradients_and_the_estimate(self):
        kept = history(every=10).history
        estimate = kept.reports["gradients"][1] + 2 * kept.reports["products"][1]
        assert kept.cost.tolist() == [0.0, 9 + estimate, 18 + 2 * estimate]

    def test_every_clipped_entry_is_counted(self):
        problem = hg.Bilevel(lambda p, h, b: anp.sum((p - h) ** 2), lambda p, h, b: anp.sum((p + 9) ** 2))
        tuner = hg.Tuner(problem, hg.Greedy(hg.SGD(0.1)), hg.NonNegative(), hg.SGD(0.1), every=1)
        done = tuner.run(np.zeros(3), np.array([1e-3, 1e-3, 5.0]), None, None, 2)
        assert done.history.clipped[:2].tolist() == [0, 2] and np.array_equal(done.hparams[:2], [0.0, 0.0])
        assert done.hparams[2] > 0


class TestLargeLeaves:
    @pytest.mark.parametrize("size, shape", [(LARGEST_LEAF, (LARGEST_LEAF,)), (LARGEST_LEAF + 1, (3,))])
    def test_they_are_summarised_and_others_kept_whole(self, size, shape):
        weights = np.arange(float(size))
        kept = hg.History.start(get_backend("numpy"), {"weights": weights})
        (row,) = kept.values["hparams['weights']"]
        assert row.shape == shape
        if shape == (3,):
            np.testing.assert_array_equal(row, [0.0, weights.mean(), size - 1.0])

    def test_a_row_is_a_copy(self):
        value = np.ones(2)
        kept = hg.History.start(get_backend("numpy"), value)
        value += 1
        np.testing.assert_array_equal(kept.values["hparams"][0], np.ones(2))


class TestFiles:
    def test_saved_and_loaded(self, backend, tmp_path):
        kept = history(backend).history
        kept.save(tmp_path / "run.npz")
        equal(hg.History.load(tmp_path / "run.npz"), kept)
        equal(hg.History.load(str(tmp_path / "run.npz")), kept)

    def test_a_failed_write_leaves_the_old_one(self, tmp_path, monkeypatch):
        old, path = history().history, tmp_path / "run.npz"
        old.save(path)
        monkeypatch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="no space"):
            history(steps=40).history.save(path)
        equal(hg.History.load(path), old)
        assert list(tmp_path.iterdir()) == [path]

    def test_it_lies_on_disk_before_it_takes_the_place_of_the_old_one(self, tmp_path, monkeypatch):
        done, fsync, replace = [], os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b))[1])
        history().history.save(tmp_path / "run.npz")
        assert done[:2] == ["fsync", "replace"]

    def test_none_is_no_damage(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            hg.History.load(tmp_path / "run.npz")

    def test_objects_are_not_unpickled(self, tmp_path):
        np.savez(tmp_path / "run.npz", steps=np.array([print], dtype=object))
        with pytest.raises(CheckpointError, match="damaged"):
            hg.History.load(tmp_path / "run.npz")

    def test_a_missing_column_is_named(self):
        columns = history().history.arrays()
        del columns["clipped"]
        with pytest.raises(CheckpointError, match="clipped"):
            hg.History.from_arrays(columns)


class TestPictures:
    def test_a_figure_and_a_png(self, backend, tmp_path):
        figure = history(backend).history.plot(tmp_path / "run.png")
        assert isinstance(figure, Figure) and len(figure.axes) == 2
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    def test_a_line_for_each_number_and_an_index_where_there_are_several(self):
        kept = history(steps=10).history
        values = {"hparams['a']": np.array([[1.0, 2.0]] * 2), "hparams['b']": np.array([3.0] * 2)}
        run = replace(kept, values=values)
        labels = [text.get_text() for text in run.plot().axes[1].get_legend().get_texts()]
        assert labels == ["['a'][0]", "['a'][1]", "['b']"]

    def test_no_file_unless_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        figure, drawn = history().history.plot(), io.BytesIO()
        figure.savefig(drawn)
        assert drawn.getvalue() and not list(tmp_path.iterdir())

    def test_without_matplotlib_the_command_is_named(self, monkeypatch):
        monkeypatch.setattr("hypergrad.tuning.plot.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install 'hypergradients\[plot\]'"):
            history().history.plot()
