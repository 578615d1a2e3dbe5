"""Tensors on `meta`, a device that has no values to read."""

import pytest
import torch
from hypergrad_torch import ModuleTuner
from support.devices import (
    IMPLICIT,
    OPTIMISERS,
    PROBLEM,
    classify,
    estimate,
    every_implicit,
    every_module_estimator,
    every_rule,
    every_training,
    lies_on,
    mlp,
    module_tuner,
    net,
    refuses_two_devices,
    task,
    with_penalty,
)
from torch import optim

import hypergrad as hg

parametrize = pytest.mark.parametrize


class TestMeta:
    """A device without values: whoever reads one fails at once, so none is read."""

    def check(self, out, dtype):
        hparams = task("meta", dtype)[1]
        assert out.hypergradient.keys() == hparams.keys()
        for name, h in hparams.items():
            g = out.hypergradient[name]
            assert (g.shape, g.dtype, g.device) == (h.shape, h.dtype, h.device)
        lies_on(out, "meta")

    @every_training
    @every_rule
    def test_estimators_that_train(self, rule, make):
        estimator = make(rule)
        out = estimate(estimator, "meta", estimates=2 if estimator.training_steps == 1 else 1)
        self.check(out, torch.float64)

    @every_implicit
    def test_implicit(self, estimator):
        self.check(estimate(estimator, "meta"), torch.float64)

    @parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @every_training
    def test_other_precisions(self, make, dtype):
        self.check(estimate(make(hg.Adam(0.02)), "meta", dtype), dtype)

    SPACES = {
        "real": hg.Real(),
        "positive": hg.Positive(),
        "softplus": {"log_l2": hg.Positive("softplus"), "noise": hg.NonNegative()},
        "interval": hg.Interval(-1.0, 2.0),
        "simplex": {"log_l2": hg.Simplex(), "noise": hg.Real()},
    }

    @parametrize("space", SPACES.values(), ids=SPACES)
    def test_tuner(self, space):
        self.tunes(hg.Tuner(PROBLEM, hg.Greedy(hg.Adam(0.02)), space, every=2))

    def test_tuner_that_unrolls(self):
        self.tunes(hg.Tuner(PROBLEM, hg.Unrolled(hg.Adam(0.02), 2), every=3, restart=True))

    def test_tuner_with_an_implicit_estimator(self):
        self.tunes(hg.Tuner(PROBLEM, IMPLICIT["cg"], every=2, update=hg.Adam(0.02)))

    def tunes(self, tuner):
        params, hparams, train, val = task("meta")
        state, estimates = tuner.init(params, hparams), 0
        for _ in range(6):
            state, step = tuner.step(state, lambda t: train[t % 3], val)
            lies_on((state, step), "meta")
            estimates += step.estimate is not None
        assert estimates > 0
        lies_on(tuner.hparams(state), "meta")

    @every_module_estimator
    @parametrize("model", [mlp, net], ids=["mlp", "batch-norm"])
    def test_module_tuner(self, model, estimator):
        self.trains(*module_tuner("meta", model, estimator=estimator))

    @parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
    def test_module_tuner_by_every_optimiser(self, make):
        self.trains(*module_tuner("meta", net, make))

    def test_module_tuner_that_clips(self):
        self.trains(*module_tuner("meta", net, max_norm=0.5))

    def test_module_tuner_of_micro_batches(self):
        tuner, train, val = module_tuner("meta", net, micro_batches=2)
        self.trains(tuner, [train, train], val)

    def test_module_made_on_meta(self):
        with torch.device("meta"):
            model, hparams = net("meta"), {"log_l2": torch.zeros(2), "noise": torch.zeros(())}
            batch = {"x": torch.zeros(8, 3), "noise": torch.zeros(8, 3), "label": torch.zeros(8).long()}
        hyper = optim.Adam(hparams.values(), lr=0.01)
        options = {"inner": with_penalty, "outer": classify, "hyper_update": hyper, "every": 2}
        self.trains(ModuleTuner(model, optim.Adam(model.parameters()), hparams, **options), batch, batch)

    def trains(self, tuner, train, val):
        tuned = []
        for _ in range(3):
            metrics = tuner.step(train, val)
            tuned.append(metrics.estimate is not None)
            lies_on(metrics, "meta")
        assert tuned == [False, True, False] and tuner.steps == 3
        lies_on((dict(tuner.model.state_dict()), tuner.hparams), "meta")


def test_two_devices_are_refused():
    refuses_two_devices("cpu", "meta")
