"""Hypergradients of `ModuleTuner` against real training."""

import copy
from functools import partial

import pytest
import torch
from support.architectures import ARCHITECTURES, architecture, drop_net
from support.modules import (
    FIRST_STEP,
    OPTIMISERS,
    Start,
    Task,
    check,
    data,
    fit,
    fit_in_eval,
    grouped,
    halve_last,
    loop,
    make,
    momentum,
    noisy_l2,
    two_hparams,
)
from torch import nn, optim

import hypergrad as hg

parametrize = pytest.mark.parametrize


class TestHypergradient:
    """Against central differences of real training."""

    @parametrize("rule", OPTIMISERS.values(), ids=OPTIMISERS)
    def test_through_a_warm_optimiser(self, rule):
        check(grouped(rule), 6)

    @parametrize("rule", FIRST_STEP.values(), ids=FIRST_STEP)
    def test_of_the_first_step(self, rule):
        check(grouped(rule), 1)

    def test_with_hooks(self):
        def hooked():
            model = drop_net()
            model[0].register_forward_hook(lambda module, args, out: 0.9 * out)
            return model

        check(make(hooked, outer=fit_in_eval, prepare=halve_last), 4)

    @parametrize("max_norm", [0.05, 100.0])
    def test_through_clipping(self, max_norm):
        check(make(), 4, max_norm=max_norm)

    def test_through_micro_batches(self):
        task = make()
        task.train = [data(3, 4) for _ in range(4)]
        check(task, 4, micro_batches=3)

    def test_with_a_direct_term(self):
        def outer(model, hparams, batch):
            return fit(model, hparams, batch) * (1 + hparams["noise"]) + hparams["only"].sin().sum()

        check(make(hparams=two_hparams() | {"only": torch.randn(2, requires_grad=True)}, outer=outer), 3)

    def test_after_training_without_a_tuner(self):
        task = make(optimizer=OPTIMISERS["adam"])
        loop(task, task.train[5:])
        check(task, 1)

    @parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    @parametrize("every", [3, 5])
    @parametrize("rule", [OPTIMISERS["sgd-nesterov"], OPTIMISERS["sgd-dampening"]])
    def test_of_an_unroll(self, rule, every, tape):
        check(grouped(rule), every, 3, estimator=lambda opt: hg.Unrolled(opt, steps=3, tape=tape))

    @parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    @parametrize("name", ["dropout", "convolution-batchnorm"])
    def test_of_an_unroll_with_draws_and_buffers(self, name, tape):
        task = architecture(name, 7, optimizer=OPTIMISERS["adam"])
        check(task, 7, 3, estimator=lambda opt: hg.Unrolled(opt, steps=3, tape=tape))

    def test_without_lookahead(self):
        task, steps = make(), 4
        frozen = copy.deepcopy(task)
        loop(frozen, frozen.train[: steps - 1])
        v = torch.autograd.grad(fit(frozen.model, {}, task.val), list(frozen.model.parameters()))

        def along(model, hparams):
            return sum((p * q).sum() for p, q in zip(model.parameters(), v, strict=True))

        metrics = check(task, steps, value=along, estimator=lambda opt: hg.Greedy(opt, lookahead=False))
        torch.testing.assert_close(metrics.outer_value, fit(frozen.model, {}, task.val).detach())

    @parametrize("rule", [partial(optim.NAdam, lr=0.01), OPTIMISERS["adamw"], momentum])
    def test_of_the_gradient_alone(self, rule):
        task, steps = make(optimizer=rule), 4
        tuner = task.tuner(every=steps, estimator=hg.Greedy(task.optimizer, response="gradient"))
        for batch in task.train[: steps - 1]:
            tuner.step(batch, task.val)
        start = Start.of(task)
        found = tuner.step(task.train[steps - 1], task.val).estimate.hypergradient
        after = start.end(task, [task.train[steps - 1]], copy.deepcopy(task.hparams))
        v = torch.autograd.grad(fit(after, {}, task.val), list(after.parameters()))
        loss = noisy_l2(start.model, task.hparams, task.train[steps - 1])
        slope = torch.autograd.grad(loss, list(start.model.parameters()), create_graph=True)
        expected = torch.autograd.grad(slope, list(task.hparams.values()), [-part for part in v])
        for name, part in zip(task.hparams, expected, strict=True):
            torch.testing.assert_close(found[name], part, rtol=1e-10, atol=0)

    def test_of_the_implicit_function_theorem(self):
        x, y, x2, y2 = torch.randn(30, 3), torch.randn(30), torch.randn(30, 3), torch.randn(30)
        hparams = {"log_l2": torch.tensor([-1.0, 0.5, 0.0], requires_grad=True)}
        squares = lambda model, h, b: (model(b[0])[:, 0] - b[1]).square().mean()  # noqa: E731
        ridge = lambda m, h, b: squares(m, h, b) + (h["log_l2"].exp() * m.weight.square()).sum()  # noqa: E731
        model = nn.Linear(3, 1, bias=False)
        task = Task(model, optim.SGD(model.parameters(), 0.2), hparams, [], (x2, y2), ridge, squares)
        tuner = task.tuner(every=150, estimator=hg.Implicit(hg.Direct()))
        for _ in range(150):
            metrics = tuner.step((x, y), task.val)
        log_l2 = hparams["log_l2"].detach().requires_grad_()
        optimum = torch.linalg.solve(x.T @ x / 30 + log_l2.exp().diag(), x.T @ y / 30)
        (expected,) = torch.autograd.grad((x2 @ optimum - y2).square().mean(), log_l2)
        torch.testing.assert_close(metrics.estimate.hypergradient["log_l2"], expected, rtol=1e-6, atol=0)


class TestArchitectures:
    @parametrize("rule", [momentum, OPTIMISERS["adam"]], ids=["sgd", "adam"])
    @parametrize("name", ARCHITECTURES)
    def test_against_central_differences(self, name, rule):
        check(architecture(name, optimizer=rule), 4)
