"""When and how `ModuleTuner` moves hyperparameters, and what it tells."""

import copy

import pytest
import torch
from support.modules import check, fit, identical, make, named, noisy_l2, predict
from torch import nn, optim
from torch.nn import functional as F

import hypergrad as hg

parametrize = pytest.mark.parametrize


class TestMetrics:
    @parametrize("every", [1, 3])
    def test_hyperparameters_move_on_every_so_many_calls(self, every):
        task = make()
        leaves = list(task.hparams.values())
        tuner = task.tuner(every=every, hyper_update=optim.Adam(leaves, 1e-2))
        for call, batch in enumerate(task.train[:7], 1):
            before = copy.deepcopy(task.hparams)
            metrics = tuner.step(batch, task.val)
            moves = call % every == 0
            assert (metrics.estimate is not None) == (metrics.outer_value is not None) == moves
            for name, h in task.hparams.items():
                assert torch.equal(h, before[name]) != moves
        assert all(mine is leaf for mine, leaf in zip(task.hparams.values(), leaves, strict=True))

    def test_losses_are_those_of_the_step(self):
        task = make()
        tuner = task.tuner(every=2)
        for batch in task.train[:2]:
            value = noisy_l2(task.model, task.hparams, batch).detach()
            metrics = tuner.step(batch, task.val)
            assert isinstance(metrics, tuple) and metrics.inner_value.shape == ()
            assert not metrics.inner_value.requires_grad
            torch.testing.assert_close(metrics.inner_value, value)
        torch.testing.assert_close(
            torch.as_tensor(metrics.outer_value), fit(task.model, {}, task.val).detach()
        )
        assert isinstance(metrics.estimate, hg.Estimate) and isinstance(metrics.estimate.report, hg.Report)

    def test_the_hyper_optimizer_steps_by_the_hypergradient(self):
        task, seen = make(), []
        leaves = named(task.hparams)
        hyper = optim.Adam(leaves.values(), 1e-2)
        hyper.register_step_pre_hook(
            lambda *_: seen.append({name: leaf.grad.clone() for name, leaf in leaves.items()})
        )
        mirror = copy.deepcopy(task.hparams)
        follower = optim.Adam(mirror.values(), 1e-2)
        tuner = task.tuner(hyper_update=hyper)
        for batch in task.train[:4]:
            hypergradient = tuner.step(batch, task.val).estimate.hypergradient
            identical(dict(hypergradient), seen[-1])
            for name, leaf in mirror.items():
                leaf.grad = hypergradient[name]
            follower.step()
            for name, leaf in mirror.items():
                assert torch.equal(task.hparams[name], leaf)
        assert len(seen) == 4


class TestHyperparametersInModules:
    def weighted(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())

        def inner(model, hparams, batch):
            losses = F.cross_entropy(predict(model, batch), batch["y"], reduction="none")
            weights = hparams["aug"](batch["x"])[:, 0]
            penalty = sum(p.square().sum() for p in model.parameters())
            return (weights * losses).mean() + hparams["log_l2"].exp() * penalty

        return make(hparams={"aug": net, "log_l2": torch.tensor(-3.0, requires_grad=True)}, inner=inner)

    @parametrize("estimator", [None, lambda opt: hg.Unrolled(opt, steps=3)], ids=["greedy", "unrolled"])
    def test_a_weighting_net_gets_the_right_gradient(self, estimator):
        task = self.weighted()
        metrics = check(task, 4, 3 if estimator else 1, estimator=estimator)
        found = metrics.estimate.hypergradient["aug"]
        expected = dict(task.hparams["aug"].named_parameters())
        assert isinstance(found, dict) and found.keys() == expected.keys()
        assert all(found[name].shape == p.shape for name, p in expected.items())

    def test_it_is_moved_in_place(self):
        task = self.weighted()
        net, leaves = task.hparams["aug"], named(task.hparams)
        before = copy.deepcopy(leaves)
        tuner = task.tuner(hyper_update=optim.SGD(net.parameters(), 1.0), every=2)
        for batch in task.train[:2]:
            metrics = tuner.step(batch, task.val)
        assert task.hparams["aug"] is net
        for name, leaf in named(task.hparams).items():
            moved = name != "log_l2"
            step = named(metrics.estimate.hypergradient)[name]
            assert leaf is leaves[name] and leaf.grad is None
            torch.testing.assert_close(leaf, before[name] - step if moved else before[name])
