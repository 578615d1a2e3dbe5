"""Ctrl-C and SIGTERM at any line: the module is as before the step or as after it, and a run can go on."""

import copy
import os
import random
import signal

import pytest
import torch
from support.modules import ESTIMATORS, OPTIMISERS, data, eventful, identical, make, named, snapshot
from support.nightly import rounds
from support.signals import at_line, count_lines, fresh, in_a_child
from torch import optim

from hypergrad.errors import TornStateError

ROUNDS = rounds(6, 200)
KINDS = ["default", "full", "implicit"]


def build(seed, estimator="default"):
    task = make(eventful, OPTIMISERS["adam"], seed=seed)
    hyper = optim.Adam(named(task.hparams).values(), 0.05)
    made = ESTIMATORS[estimator](task.optimizer)
    return task, hyper, task.tuner(hyper_update=hyper, every=3, estimator=made)


class Interrupted:
    """A tuner that is put back before each interrupted call, and what its call leaves otherwise."""

    def __init__(self, estimator, taken, call):
        self.batches, self.val = data(4, 4), data(1, 4)[0]
        self.task, self.hyper, self.tuner = build(1, estimator)
        for batch in self.batches[:taken]:
            self.tuner.step(batch, self.val)
        self.state = copy.deepcopy(self.tuner.state_dict())
        self.call = lambda: call(self.tuner, self.batches[taken], self.val)
        self.before = self.everything()
        self.call()
        self.after = self.everything()
        for _ in range(2):  # the first call after a load runs lines that later ones do not
            self.again()
            self.lines = count_lines(self.call)

    def again(self):
        self.tuner.load_state_dict(self.state)
        for p in self.task.model.parameters():
            p.grad = None

    def everything(self):
        tuner = self.tuner
        counts = tuner.steps, tuner.updates, tuner._training.since, tuner._training.window is None
        modes = [part.training for part in self.task.model.modules()]
        return snapshot(self.task, self.hyper), list(tuner.history.inner_values), counts, modes

    def is_whole(self):
        for state in (self.before, self.after):
            try:
                identical(self.everything()[0], state[0])
            except AssertionError:
                continue
            assert self.everything()[1:] == state[1:]
            return True
        return False


CALLS = {
    "plain": (0, lambda tuner, batch, val: tuner.step(batch, val)),
    "update": (2, lambda tuner, batch, val: tuner.step(batch, val)),
    "tune": (1, lambda tuner, batch, val: tuner.tune(batch, val)),
}


@pytest.mark.parametrize("estimator", KINDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_leaves_the_state_before_or_after(estimator, call, number):
    if (estimator, call) == ("full", "tune"):
        pytest.skip("an unroll of several steps trains")
    given = Interrupted(estimator, *CALLS[call])
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # All lines of a plain step, which moves parameters without a copy to go back to, and some of others.
        every = 1 if call == "plain" and number == signal.SIGINT else max(1, given.lines // 40)
        for line in range(1, given.lines + 1, every):
            given.again()
            with pytest.raises(KeyboardInterrupt), at_line(line, number):
                given.call()
            assert given.is_whole(), line
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("call", CALLS)
def test_a_second_ctrl_c_ends_a_step_at_once_and_the_tuner_says_so(call):
    given, torn = Interrupted("default", *CALLS[call]), 0
    rng = random.Random(0)
    for _ in range(40):
        given.again()
        line, apart = rng.randrange(1, given.lines - 60), rng.randrange(1, 50)
        with pytest.raises(KeyboardInterrupt), at_line(line, signal.SIGINT, signal.SIGINT, apart=apart):
            given.call()
        try:
            given.tuner.state_dict()
        except TornStateError:
            torn += 1
            with pytest.raises(TornStateError):
                given.call()
        else:
            assert given.is_whole()
    assert torn > 30
    given.again()
    given.call()
    identical(given.everything()[0], given.after[0])


def test_a_load_is_whole_too():
    given = Interrupted("default", *CALLS["update"])
    given.again()
    given.call()
    other = copy.deepcopy(given.tuner.state_dict())
    lines = count_lines(lambda: given.tuner.load_state_dict(other))
    for line in range(1, lines, lines // 60):
        given.again()
        with pytest.raises(KeyboardInterrupt), at_line(line, signal.SIGINT):
            given.tuner.load_state_dict(other)
        assert given.is_whole()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("estimator", KINDS)
def test_a_run_saves_before_sigterm_ends_it(estimator, tmp_path):
    fresh(rounds_of_sigterm, estimator, tmp_path / "run.npz")


def rounds_of_sigterm(estimator, path):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # other threads do not live on in a child
    batches, val, steps = data(8, 4), data(2, 4), 8
    whole, hyper, tuner = build(1, estimator)
    tuner.run(batches, val, steps, progress=False)
    end = snapshot(whole, hyper)
    _, _, tuner = build(1, estimator)
    lines = count_lines(lambda: tuner.run(batches, val, steps, save_to=path, progress=False))
    rng, done = random.Random(0), set()
    for _ in range(ROUNDS):
        path.unlink()
        _, _, tuner = build(1, estimator)
        line = rng.randrange(lines // 20, 9 * lines // 10)

        def child(line=line, tuner=tuner):
            with at_line(line, signal.SIGTERM):
                tuner.run(batches, val, steps, save_to=path, progress=False)

        assert in_a_child(child) == -signal.SIGTERM
        task, hyper, resumed = build(2, estimator)
        resumed.load(path)
        done.add(resumed.steps)
        resumed.run(batches, val, steps, progress=False)
        identical(snapshot(task, hyper), end)
    assert len(done) > 1


def test_a_faulty_step_of_a_run_leaves_the_draws_of_those_before():
    """What a run has done before a fault stays, the state of generators included."""
    batches, val = data(6, 4), data(1, 4)
    task, hyper, tuner = build(1)
    for batch in batches[:4]:
        tuner.step(batch, val[0])
    expected = snapshot(task, hyper)
    task, hyper, tuner = build(1)
    bad = {"x": torch.full((8, 4), torch.nan), "y": batches[0]["y"], "noise": batches[0]["noise"]}
    with pytest.raises(ArithmeticError):
        tuner.run([*batches[:4], bad], val, 6, progress=False)
    identical(snapshot(task, hyper), expected)
