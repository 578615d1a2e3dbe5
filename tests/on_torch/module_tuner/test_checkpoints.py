"""Runs of `ModuleTuner` that are saved and resumed."""

import copy
import math
import random

import pytest
import torch
from support.architectures import drop_net
from support.modules import (
    ESTIMATORS,
    OPTIMISERS,
    data,
    eventful,
    identical,
    make,
    named,
    snapshot,
    two_hparams,
)
from support.nightly import rounds
from torch import nn, optim

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


class TestCheckpoints:
    def build(self, seed, model=eventful, estimator="default", **given):
        task = make(model, OPTIMISERS["adam"], seed=seed, **given)
        hyper = optim.Adam(named(task.hparams).values(), 0.05)
        made = ESTIMATORS[estimator](task.optimizer)
        return task, hyper, task.tuner(hyper_update=hyper, every=4, estimator=made)

    @parametrize("estimator", ["default", "full", "states", "implicit"])
    @parametrize("cut", [0, 1, 4, 5, 6])
    def test_a_run_resumes_bit_for_bit(self, cut, estimator, tmp_path):
        batches, val = data(10, 4), data(1, 4)[0]
        task, hyper, tuner = self.build(1, estimator=estimator)
        for step, batch in enumerate(batches):
            if step == cut:
                torch.save(tuner.state_dict(), tmp_path / "run.pt")
            tuner.step(batch, val)
        again, hyper2, resumed = self.build(2, estimator=estimator)
        with torch.no_grad():
            again.hparams["noise"].fill_(5.0)
        resumed.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True))
        for batch in batches[cut:]:
            resumed.step(batch, val)
        identical(snapshot(again, hyper2), snapshot(task, hyper))

    OTHERS = {
        "narrower": {"model": drop_net},
        "deeper": {"model": lambda: nn.Sequential(eventful(), nn.Linear(3, 3))},
        "renamed": {"log_l2": [0.0] * 3, "scale": 0.3},
        "reshaped": {"log_l2": [0.0] * 4, "noise": 0.3},
    }

    @parametrize("other", OTHERS.values(), ids=OTHERS)
    def test_a_state_of_another_structure_is_refused(self, other):
        if "model" not in other:
            other = {"hparams": {name: torch.tensor(h, requires_grad=True) for name, h in other.items()}}
        self.refuses(self.build(1, **other)[2].state_dict())

    CHANGES = {
        "space": ({"space": hg.Interval(-9.0, 9.0)}, "recipe.space.type: 'Real', here 'Interval'"),
        "every": ({"every": 5}, "recipe.every: 4, here 5"),
        "max_norm": ({"max_norm": 1.0}, "recipe.max_norm: None, here 1.0"),
        "micro_batches": ({"micro_batches": 2}, "recipe.micro_batches: 1, here 2"),
        "estimator": ({"estimator": hg.Greedy}, "recipe.estimator.type: 'Unrolled', here 'Greedy'"),
        "optimizer": ({}, "recipe.optimizer: 'Adam', here 'SGD'"),
        "hyper_update": ({"hyper_update": hg.Adam(0.01)}, "recipe.hyper_update: 'Adam', here nothing"),
    }

    @parametrize("change", CHANGES)
    def test_a_state_of_another_recipe_is_refused_with_every_difference(self, change):
        changed, line = self.CHANGES[change]
        state = self.build(1, estimator="full")[2].state_dict()
        task = make(eventful, OPTIMISERS["sgd" if change == "optimizer" else "adam"])
        if "estimator" in changed:
            changed = {"estimator": hg.Greedy(task.optimizer)}
        hyper = optim.Adam(named(task.hparams).values(), 0.05)
        given = {"hyper_update": hyper, "every": 4, "estimator": ESTIMATORS["full"](task.optimizer)} | changed
        with pytest.raises(errors.CheckpointError) as caught:
            task.tuner(**given).load_state_dict(state)
        assert line in str(caught.value)

    def test_a_state_can_be_read_twice(self):
        """What a run does with a state that it was given leaves the state as it was."""
        batches, val = data(10, 4), data(1, 4)[0]
        tuner = self.build(1)[2]
        for batch in batches[:5]:
            tuner.step(batch, val)
        state, ends = tuner.state_dict(), []
        state = copy.deepcopy(state)
        for seed in (2, 3):
            task, hyper, again = self.build(seed)
            again.load_state_dict(state)
            for batch in batches[5:]:
                again.step(batch, val)
            ends.append(snapshot(task, hyper))
        identical(*ends)

    def test_a_module_that_refuses_its_state_leaves_everything_as_it_was(self):
        state = copy.deepcopy(self.build(1)[2].state_dict())
        task, hyper, tuner = self.build(2)
        tuner.step(task.train[0], task.val)
        before, calls = snapshot(task, hyper), []

        def refuse(module, keys):
            calls.append(keys)
            if len(calls) == 1:
                raise ValueError("not today")

        task.model.register_load_state_dict_post_hook(refuse)
        with pytest.raises(errors.CheckpointError, match="not today"):
            tuner.load_state_dict(state)
        identical(snapshot(task, hyper), before)

    def test_a_state_with_nothing_in_it_is_refused(self):
        self.refuses({})

    def refuses(self, state):
        task, hyper, tuner = self.build(2)
        tuner.step(task.train[0], task.val)
        before = snapshot(task, hyper)
        with pytest.raises(errors.CheckpointError):
            tuner.load_state_dict(state)
        identical(snapshot(task, hyper), before)


class TestFiles:
    build = TestCheckpoints.build

    @parametrize("estimator", ["default", "full", "implicit"])
    @parametrize("cut", [0, 5, 7])
    def test_a_run_resumes_bit_for_bit(self, cut, estimator, tmp_path):
        batches, val = data(10, 4), data(1, 4)[0]
        task, hyper, tuner = self.build(1, estimator=estimator)
        for step, batch in enumerate(batches):
            if step == cut:
                tuner.save(tmp_path / "run.npz")
            tuner.step(batch, val)
        again, hyper2, resumed = self.build(2, estimator=estimator)
        resumed.load(tmp_path / "run.npz")
        for batch in batches[cut:]:
            resumed.step(batch, val)
        identical(snapshot(again, hyper2), snapshot(task, hyper))

    def test_bfloat16_comes_back(self, tmp_path):
        task, _, tuner = self.build(
            1, hparams={k: h.detach().requires_grad_() for k, h in two_hparams().items()}
        )
        task.model.register_buffer("short", torch.tensor([1.5, -3e30], dtype=torch.bfloat16))
        tuner.save(tmp_path / "run.npz")
        task.model.short.zero_()
        tuner.load(tmp_path / "run.npz")
        assert task.model.short.tolist() == torch.tensor([1.5, -3e30], dtype=torch.bfloat16).tolist()

    def test_a_run_saves_on_its_way_and_goes_on_from_the_newest(self, tmp_path):
        batches, val = data(12, 4), data(1, 4)
        task, hyper, tuner = self.build(1)
        tuner.run(batches, val, 12, progress=False)
        _, _, saving = self.build(1)
        saving.run(batches, val, 8, save_to=tmp_path, save_every=3, keep=2, progress=False)
        assert sorted(file.name for file in tmp_path.iterdir()) == [f"step-{k:09d}.npz" for k in (6, 8)]
        again, hyper2, resumed = self.build(2)
        resumed.load_latest(tmp_path)
        assert resumed.steps == 8
        resumed.run(batches, val, 12, progress=False)
        identical(snapshot(again, hyper2), snapshot(task, hyper))

    def test_a_batch_that_no_file_holds(self, tmp_path):
        task, _, tuner = self.build(1, estimator="full")
        for batch in task.train[:3]:
            tuner.step(batch | {"more": object()}, task.val)
        with pytest.raises(errors.CheckpointError, match=r"\['batch'\]\['more'\] is object"):
            tuner.save(tmp_path / "run.npz")

    def test_a_file_of_a_functional_tuner(self, tmp_path):
        zero = torch.zeros(2)
        tuner = hg.Tuner(
            hg.Bilevel(lambda w, h, b: (w - h).square().sum(), lambda w, h, b: w.sum()),
            hg.Greedy(hg.SGD(0.1)),
        )
        tuner.save(tmp_path / "run.npz", tuner.run(zero, zero, [None], [None], 2, progress=False))
        with pytest.raises(errors.CheckpointError, match="kind: 'run', here 'module'"):
            self.build(1)[2].load(tmp_path / "run.npz")


class TestAnyOtherState:
    """Every part of a state in turn is another value, or missing: refused with nothing changed, or usable."""

    VALUES = (
        None,
        math.inf,
        -1,
        3,
        "x",
        True,
        [],
        {},
        torch.zeros(2),
        torch.zeros(3, dtype=torch.int64),
        (1, 2),
    )
    ROUNDS = rounds(300, 10_000)

    @parametrize("estimator, inner", [("full", "adam"), ("default", "sgd"), ("implicit", "adam")])
    def test_is_refused_or_goes_on(self, estimator, inner):
        batches, val = data(10, 4), data(1, 4)[0]
        tuners = []
        for seed, steps in ((1, 7), (2, 1)):
            task = make(eventful, OPTIMISERS[inner], seed=seed)
            hyper = optim.Adam(named(task.hparams).values(), 0.05)
            given = {"hyper_update": hyper, "every": 4, "estimator": ESTIMATORS[estimator](task.optimizer)}
            tuner = task.tuner(**given)
            for batch in batches[:steps]:
                tuner.step(batch, val)
            tuners.append(tuner)
        state, start = (copy.deepcopy(tuner.state_dict()) for tuner in tuners)
        before, refused = snapshot(task, hyper), 0
        rng = random.Random(0)
        parts = [path for path in nodes(state) if "batch" not in path]
        for _ in range(self.ROUNDS):
            path, value = rng.choice(parts), rng.choice((*self.VALUES, MISSING))
            try:
                tuner.load_state_dict(put(state, path, value))
            except errors.CheckpointError:
                identical(snapshot(task, hyper), before)
                refused += 1
                continue
            try:
                tuner.step(batches[7], val)
            except errors.ReplayError:
                pass  # a state that could have been, of other steps than the window records
            tuner.load_state_dict(start)
            before = snapshot(task, hyper)
        assert refused > self.ROUNDS / 2


MISSING = object()


def nodes(value, path=()):
    if path:
        yield path
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list | tuple) else ()
    for key in keys:
        yield from nodes(value[key], (*path, key))


def put(value, path, new):
    """The containers with one part exchanged, or left out."""
    key, *rest = path
    if isinstance(value, tuple):
        return tuple(put(list(value), path, new))
    changed = copy.copy(value)
    if rest:
        changed[key] = put(value[key], rest, new)
    elif new is MISSING:
        del changed[key]
    else:
        changed[key] = new
    return changed
