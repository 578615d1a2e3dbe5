"""Ctrl-C, SIGTERM and SIGKILL: what is left is the state before or the state after, and nothing is lost."""

import os
import random
import signal
import threading

import numpy as np
import pytest
from support.frameworks import each
from support.nightly import rounds
from support.signals import at_line, count_lines, fresh, in_a_child

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.backend.turns import turns
from hypergrad.errors import TornStateError
from hypergrad.tuning.interrupts import Interrupts

numpy = get_backend("numpy")
X, Y = np.random.default_rng(3).normal(size=(8, 3)), np.random.default_rng(4).normal(size=8)
STEPS, ROUNDS = 30, rounds(6, 200)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def tuner_of(backend, draws=False):
    xp = backend.xp

    def mse(w, b):
        return xp.mean((b["x"] @ w - b["y"]) ** 2)

    def inner(w, h, b):
        noise = np.random.normal() if draws else 0.0
        return mse(w, b) * (1.0 + 0.1 * noise) + xp.exp(h) * xp.sum(w**2)

    return hg.Tuner(hg.Bilevel(inner, lambda w, h, b: mse(w, b)), hg.Greedy(hg.SGD(0.05, 0.9)), every=3)


def given(backend):
    x, y, w, h = (backend.asarray(v, like=None) for v in (X, Y, np.zeros(3), np.array(-2.0)))
    return w, h, lambda t: {"x": x, "y": y * (1 + t)}, {"x": x, "y": y}


def run(backend, steps=STEPS, **options):
    return tuner_of(backend).run(*given(backend), steps, progress=False, **options)


def same(mine, other):
    return all(
        np.array_equal(column, other.arrays()[name], equal_nan=True) for name, column in mine.arrays().items()
    )


class TestBlocks:
    def test_signals_wait_for_the_end(self):
        came, done = [], []
        before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
        try:
            with pytest.raises(KeyboardInterrupt), Interrupts() as outer:
                with outer:
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGINT)
                assert outer.pending and not came
                done.append("all of it")
            assert done and came == [signal.SIGTERM] and not outer.torn
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_handlers_are_put_back(self):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        for stops in (False, True):
            with pytest.raises(ZeroDivisionError if stops else KeyboardInterrupt), Interrupts(saves=True):
                assert signal.getsignal(signal.SIGINT) not in handlers
                if stops:
                    raise ZeroDivisionError
                signal.raise_signal(signal.SIGINT)
            assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def test_an_ignored_signal_stays_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with Interrupts() as held:
                signal.raise_signal(signal.SIGINT)
            assert not held.pending and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_second_ctrl_c_does_not_wait(self):
        held, reached = Interrupts(), []
        with pytest.raises(KeyboardInterrupt), held:
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
            reached.append(2)
        assert reached == [1] and held.torn
        with pytest.raises(TornStateError, match="second Ctrl-C"):
            held.check()

    def test_two_owners_hand_on_what_came(self):
        with pytest.raises(KeyboardInterrupt), Interrupts() as outer:
            with Interrupts() as inner:
                signal.raise_signal(signal.SIGINT)
                assert inner.pending and not outer.pending
            assert outer.pending

    def test_other_threads_have_nothing_to_hold(self):
        def work():
            with Interrupts() as held:
                found.append((held.pending, signal.getsignal(signal.SIGINT)))

        found, handler = [], signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == [(False, handler)]


class TestCtrlC:
    @each("numpy", "torch")
    def test_a_run_ends_after_its_round_and_can_go_on(self, backend, tmp_path):
        whole = run(backend)
        lines, done = count_lines(lambda: run(backend)), set()
        for line in random.Random(0).sample(range(lines // 10, 9 * lines // 10), ROUNDS):
            with pytest.raises(KeyboardInterrupt) as stop, at_line(line, signal.SIGINT):
                run(backend, save_to=tmp_path / "run.npz")
            partial = stop.value.run
            done.add(len(partial.history.inner_values))
            w, h, *_ = given(backend)
            for resume in (
                (partial.state, partial.history),
                tuner_of(backend).load(tmp_path / "run.npz", w, h),
            ):
                assert same(run(backend, resume=resume).history, whole.history)
        assert len(done) > 2

    def test_a_run_that_waits_for_a_batch_ends_at_once(self, tmp_path):
        w, h, train, val = given(numpy)

        def batches():
            for t in range(STEPS):
                if t == 7:
                    signal.raise_signal(signal.SIGINT)
                    raise AssertionError("the signal waited")
                yield train(t)

        with pytest.raises(KeyboardInterrupt) as stop:
            tuner_of(numpy).run(w, h, batches(), val, STEPS, progress=False, save_to=tmp_path / "run.npz")
        assert len(stop.value.run.history.inner_values) == 6
        assert len(tuner_of(numpy).load(tmp_path / "run.npz", w, h)[1].inner_values) == 6

    def test_a_step_leaves_generators_as_before_or_as_after(self):
        """At every line: the state of a tuner is the caller's, and what a loss has drawn is put back."""
        tuner, (w, h, train, val) = tuner_of(numpy, draws=True), given(numpy)
        start = tuner.init(w, h)

        def step():
            return tuner.step(start._replace(since=2), train, val)[0]

        np.random.seed(0)
        states = [np.random.get_state()]
        after = step()
        states.append(np.random.get_state())
        np.random.set_state(states[0])
        lines = count_lines(step)
        for line in range(1, lines + 1):
            np.random.set_state(states[0])
            with pytest.raises(KeyboardInterrupt), at_line(line, signal.SIGINT):
                step()
            # The first line is that of the step itself, before anything is held back.
            assert any(np.array_equal(np.random.get_state()[1:3][0], s[1]) for s in states)
            assert np.random.get_state()[2] in {s[2] for s in states}
            assert turns._alone is None and not turns._shared
        np.random.set_state(states[0])
        assert all(map(np.array_equal, numpy.flatten(step())[0], numpy.flatten(after)[0]))


@needs_fork
class TestSigterm:
    @pytest.mark.parametrize("name", ["numpy", "torch"])
    @pytest.mark.parametrize("options", [{}, {"save_every": 7, "keep": 2}])
    def test_a_run_saves_and_then_is_terminated(self, name, options, tmp_path):
        pytest.importorskip(name)
        fresh(rounds_of_sigterm, name, options, tmp_path)

    def test_without_a_file_it_is_terminated_all_the_same(self):
        fresh(sigterm_without_a_file)


def rounds_of_sigterm(name, options, folder):
    backend = get_backend(name)
    whole, (w, h, *_) = run(backend), given(backend)
    path = folder / ("runs" if "keep" in options else "run.npz")
    # A call runs a few lines less than the first one, and than one that finds files to remove.
    _, lines = (
        count_lines(lambda k=k: run(backend, save_to=folder / f"counted-{k}.npz", **options))
        for k in range(2)
    )
    done = set()
    for line in random.Random(1).sample(range(1, 19 * lines // 20), ROUNDS):
        for file in path.iterdir() if path.is_dir() else [path]:
            file.unlink(missing_ok=True)

        def child(line=line):
            with at_line(line, signal.SIGTERM):
                run(backend, save_to=path, **options)

        assert in_a_child(child) == -signal.SIGTERM
        load = tuner_of(backend).load_latest if "keep" in options else tuner_of(backend).load
        try:
            resume = load(path, w, h)
        except FileNotFoundError:
            assert line < lines / 10  # nothing was under way
            continue
        done.add(len(resume[1].inner_values))
        assert same(run(backend, resume=resume).history, whole.history)
    assert len(done) > 2


def sigterm_without_a_file():
    def child():
        with at_line(800, signal.SIGTERM):
            run(numpy)

    assert in_a_child(child) == -signal.SIGTERM


@needs_fork
def test_after_sigkill_the_file_is_the_old_one_or_the_new_one(tmp_path):
    fresh(rounds_of_sigkill, tmp_path)


def rounds_of_sigkill(folder):
    tuner, (w, h, *_) = tuner_of(numpy), given(numpy)
    runs = [run(numpy, steps) for steps in (6, 9)]
    path, rng = folder / "run.npz", random.Random(2)

    def save_and_save():
        while True:
            for each_run in runs:
                tuner.save(path, each_run)

    tuner.save(path, runs[0])
    for _ in range(ROUNDS):
        assert in_a_child(save_and_save, kill_after=0.005 + 0.02 * rng.random()) == -signal.SIGKILL
        state, history = tuner.load(path, w, h)
        assert any(same(history, each_run.history) for each_run in runs)
        assert int(state.inner.step) == len(history.inner_values)
    tuner.save(path, runs[0])
    assert [file.name for file in folder.iterdir()] == ["run.npz"]
