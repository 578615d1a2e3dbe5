"""Odd modules, hooks and changes on the way, which `ModuleTuner` handles."""

import copy
from functools import partial

import pytest
import torch
from hypergrad_torch import ModuleTuner
from support.differences import five_point
from support.modules import (
    ESTIMATORS,
    Start,
    Task,
    check,
    data,
    eventful,
    fit,
    identical,
    loop,
    make,
    mlp,
    momentum,
    named,
    noisy_l2,
    predict,
    snapshot,
    two_hparams,
)
from torch import nn, optim
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


class Heads(nn.Module):
    """Two heads, of which a batch uses one."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return (self.one if x[0, 0] > 0 else self.two)(torch.tanh(self.body(x)))


def used_l2(model, hparams, batch):
    """Parameters that a batch does not use have no gradient at all, not even a penalty's."""
    penalty = (
        hparams["log_l2"][0].exp() * model.body.weight.square().sum() if isinstance(model, Heads) else 0.0
    )
    return F.cross_entropy(predict(model, batch, hparams["noise"]), batch["y"]) + penalty


def twice():
    """One layer at two places."""
    shared = nn.Linear(5, 5)
    return nn.Sequential(nn.Linear(4, 5), shared, nn.Tanh(), shared, nn.Linear(5, 3))


def smooth_units():
    """Operations of which torch has two gradient formulas, equal up to rounding."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 6), nn.Mish(), nn.Linear(6, 3)
    )


WINDOWS = {"greedy": (1, None), "full": (3, ESTIMATORS["full"]), "states": (3, ESTIMATORS["states"])}
windows = parametrize("unroll, estimator", WINDOWS.values(), ids=WINDOWS)


class TestOddUses:
    @windows
    def test_a_layer_at_two_places(self, unroll, estimator):
        task = make(twice)
        check(task, 4, unroll, estimator=estimator)
        assert type(task.model[1].weight) is nn.Parameter and task.model[1] is task.model[3]

    def test_a_layer_at_two_places_trains_as_ever(self):
        mine, yours = make(twice), make(twice)
        tuner = mine.tuner(every=3)
        for batch in mine.train:
            tuner.step(batch, mine.val)
        loop(yours, yours.train)
        identical(mine.model.state_dict(), yours.model.state_dict())

    @windows
    @parametrize("optimizer", [momentum, partial(optim.Adam, lr=0.05), partial(optim.AdamW, lr=0.05)])
    def test_parameters_that_some_steps_do_not_use(self, optimizer, unroll, estimator):
        task = make(Heads, optimizer, inner=used_l2, hparams={**two_hparams()})
        for k, batch in enumerate(task.train):
            batch["x"][0, 0] = (-1.0) ** (k // 2)  # so that windows of three see both heads
        check(task, 5, unroll, estimator=estimator)

    @parametrize("change", [{"momentum": 0.9}, {"nesterov": True}, {"maximize": True}, {"lr": 0.3}])
    @parametrize("estimator", ["full", "states"])
    def test_options_that_change_within_the_window(self, change, estimator):
        base = {"momentum": 0.0} if "momentum" in change else {}
        task = make(optimizer=lambda params: optim.SGD(params, 0.1, **{"momentum": 0.5} | base))
        tuner = task.tuner(every=3, estimator=ESTIMATORS[estimator](task.optimizer))
        start = Start.of(task)

        def train(model, optimizer, hparams, step):
            for k, batch in enumerate(task.train[:3]):
                optimizer.param_groups[0].update(
                    change if k == 1 else {key: start.optimizer.param_groups[0][key] for key in change}
                )
                step(batch, hparams, model, optimizer)

        def mine(batch, hparams, model, optimizer):
            self.metrics = tuner.step(batch, task.val)

        def yours(batch, hparams, model, optimizer):
            optimizer.zero_grad()
            noisy_l2(model, hparams, batch).backward()
            optimizer.step()

        def value(shift):
            model, optimizer = copy.deepcopy((start.model, start.optimizer))
            hparams = {
                "log_l2": task.hparams["log_l2"].detach(),
                "noise": task.hparams["noise"].detach() + shift,
            }
            train(model, optimizer, hparams, yours)
            return float(fit(model, hparams, task.val).detach())

        train(task.model, task.optimizer, None, mine)
        slope, h = self.metrics.estimate.hypergradient["noise"], 1e-4
        expected = five_point(value, h)
        assert abs(slope - expected) <= 1e-6 * abs(expected)

    @windows
    @parametrize(
        "hook", [lambda g: 0.5 * g, lambda g: g.clamp(-0.02, 0.02) + 0.1 * g], ids=["halve", "clamp"]
    )
    def test_gradient_hooks_are_no_part_of_second_derivatives(self, hook, unroll, estimator):
        prepare = lambda model: model[0].weight.register_hook(hook)  # noqa: E731
        check(make(prepare=prepare), 4, unroll, estimator=estimator)

    def test_operations_with_two_formulas_train_bit_for_bit(self):
        mine, yours = make(smooth_units), make(smooth_units)
        tuner = mine.tuner(every=1)
        for batch in mine.train:
            tuner.step(batch, mine.val)
        loop(yours, yours.train)
        identical(mine.model.state_dict(), yours.model.state_dict())

    def test_micro_batches_train_bit_for_bit(self):
        mine, yours = make(), make()
        batches = [[a, b] for a, b in zip(mine.train, mine.train[1:], strict=False)]
        tuner = mine.tuner(every=1, micro_batches=2)
        for batch in batches:
            tuner.step(batch, mine.val)
        loop(yours, batches)
        identical(mine.model.state_dict(), yours.model.state_dict())

    def test_a_hyperparameter_inside_the_model(self):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate, self.net = nn.Parameter(torch.tensor(0.7)), mlp()

            def forward(self, x):
                return self.gate * self.net(x)

        def built(shift=0.0):
            torch.manual_seed(0)
            model = Gated()
            with torch.no_grad():
                model.gate += shift
            return model, momentum(model.net.parameters())

        model, optimizer = built()
        task = Task(model, optimizer, {"gate": model.gate}, data(1, 4), data(1, 4)[0], inner=fit)
        found = task.tuner().step(task.train[0], task.val).estimate.hypergradient["gate"]

        def value(shift):
            model, optimizer = built(shift)
            fit(model, None, task.train[0]).backward()
            optimizer.step()
            return float(fit(model, None, task.val).detach())

        expected = (value(1e-5) - value(-1e-5)) / 2e-5
        assert abs(found - expected) <= 1e-7 * abs(expected)

    def test_a_mixed_term_by_differences(self):
        exact, rough = make(), make()
        mixed = hg.Greedy(rough.optimizer, products=hg.FiniteDifference())
        for k, batch in enumerate(exact.train[:4]):
            one = exact.tuner().step(batch, exact.val) if k == 3 else loop(exact, [batch])
            other = rough.tuner(estimator=mixed).step(batch, rough.val) if k == 3 else loop(rough, [batch])
        for name, g in named(one.estimate.hypergradient).items():
            found = named(other.estimate.hypergradient)[name]
            assert (found - g).norm() <= 1e-7 * g.norm()
        identical(exact.model.state_dict(), rough.model.state_dict())

    def test_a_replay_that_differs_is_noticed(self):
        task = make()
        buffer = copy.deepcopy(task.train[0])
        tuner = task.tuner(every=3, estimator=ESTIMATORS["full"](task.optimizer))
        for batch in task.train[:2]:
            for key, x in buffer.items():
                x.copy_(batch[key])
            tuner.step(buffer, task.val)
        before = snapshot(task)
        with pytest.raises(errors.ReplayError, match="changed in place"):
            tuner.step(task.train[2], task.val)
        identical(snapshot(task), before)

    def test_a_replay_that_rounds_otherwise_is_none_that_differs(self):
        """The gradient of a bias before BatchNorm is rounding alone, and Adam takes whole steps by it."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).float()
        optimizer = optim.Adam(model.parameters(), 0.01, eps=1e-20)
        hparams = torch.tensor(-2.0, dtype=torch.float32, requires_grad=True)
        x, y = torch.randn(8, 3, dtype=torch.float32), torch.randn(8, dtype=torch.float32)

        def fit(model, hparams, batch):
            return (model(x).squeeze() - y).square().mean()

        def inner(model, hparams, batch):
            return fit(model, hparams, batch) + hparams.exp() * model[2].weight.square().sum()

        unrolled = hg.Unrolled(optimizer, 3)
        tuner = ModuleTuner(model, optimizer, hparams, inner=inner, outer=fit, every=3, estimator=unrolled)
        for _ in range(12):
            tuner.step(None, None)
        assert tuner.updates == 4

    def test_modes_that_change_within_the_window(self):
        def train(model, step):
            for k, batch in enumerate(data(3, 4)):
                model.train(k != 1)
                step(batch)

        task = make(eventful)
        tuner = task.tuner(every=3, estimator=ESTIMATORS["full"](task.optimizer))
        train(task.model, lambda batch: tuner.step(batch, task.val))  # a replay that differed would raise

    def test_what_is_trained_may_change(self):
        mine, yours = make(), make()
        tuner = mine.tuner(every=2)
        for k, batch in enumerate(mine.train):
            for task in (mine, yours):
                task.model[0].weight.requires_grad_(k % 4 > 1)
            tuner.step(batch, mine.val)
            loop(yours, [batch])
        identical(mine.model.state_dict(), yours.model.state_dict())
