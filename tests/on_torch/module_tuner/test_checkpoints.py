"""Runs of `ModuleTuner` that are saved and resumed."""

import pytest
import torch
from support.architectures import drop_net
from support.modules import ESTIMATORS, OPTIMISERS, data, eventful, identical, make, named, snapshot
from torch import nn, optim

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

    def test_a_state_with_nothing_in_it_is_refused(self):
        self.refuses({})

    def refuses(self, state):
        task, hyper, tuner = self.build(2)
        tuner.step(task.train[0], task.val)
        before = snapshot(task, hyper)
        with pytest.raises(errors.CheckpointError):
            tuner.load_state_dict(state)
        identical(snapshot(task, hyper), before)
