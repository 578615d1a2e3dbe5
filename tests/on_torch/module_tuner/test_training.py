"""`ModuleTuner` trains as the loop does that it takes the place of."""

from functools import partial

import pytest
import torch
from support.architectures import architecture
from support.modules import (
    OPTIMISERS,
    check,
    data,
    eventful,
    every_estimator,
    fit,
    fit_in_eval,
    grouped,
    halve_last,
    identical,
    loop,
    make,
    mlp,
    momentum,
    noisy_l2,
    snapshot,
)
from torch import nn, optim

parametrize = pytest.mark.parametrize


class TestTraining:
    """With frozen hyperparameters it is the user's own loop, bit for bit."""

    def is_the_users(self, build, steps, estimator=lambda optimizer: None, **options):
        ends = []
        for tuned in (True, False):
            task = build(steps=steps)
            scheduler = optim.lr_scheduler.ExponentialLR(task.optimizer, 0.99)
            torch.manual_seed(1)
            if tuned:
                tuner = task.tuner(estimator=estimator(task.optimizer), **options)
                for batch in task.train:
                    tuner.step(batch, task.val)
                    scheduler.step()
            else:
                clip = {key: option for key, option in options.items() if key == "max_norm"}
                loop(task, task.train, after=scheduler.step, **clip)
            ends.append(snapshot(task, scheduler))
        identical(*ends)
        return task

    @parametrize("every", [1, 10])
    @parametrize("rule", OPTIMISERS.values(), ids=OPTIMISERS)
    def test_by_every_optimiser(self, rule, every):
        build = partial(grouped, rule, eventful, prepare=halve_last)
        task = self.is_the_users(build, 100, every=every)
        assert task.model[1].num_batches_tracked == 100

    @every_estimator
    def test_with_every_estimator(self, estimator):
        self.is_the_users(partial(make, eventful, prepare=halve_last), 20, estimator, every=5)

    @parametrize("max_norm", [0.05, 1.0, 100.0])
    def test_with_clipped_gradients(self, max_norm):
        self.is_the_users(partial(make, eventful), 20, every=2, max_norm=max_norm)

    def test_a_loss_that_leaves_the_model_in_eval_mode(self):
        self.is_the_users(partial(make, eventful, outer=fit_in_eval), 20, every=3)

    def test_parameters_that_no_loss_reaches(self):
        def build(steps):
            task = make(lambda: nn.ModuleDict({"body": mlp(), "spare": nn.Linear(2, 2)}), steps=steps)
            task.inner = lambda model, *rest: noisy_l2(model["body"], *rest)
            task.outer = lambda model, *rest: fit(model["body"], *rest)
            return task

        self.is_the_users(build, 6, every=2)

    @parametrize("held", [True, False], ids=["in-the-optimizer", "not-in-it"])
    def test_frozen_parameters(self, held):
        def build(steps):
            task = make(steps=steps)
            task.model[0].weight.requires_grad_(False)
            task.optimizer = momentum(p for p in task.model.parameters() if held or p.requires_grad)
            return task

        task = self.is_the_users(build, 6, every=2)
        identical(task.model[0].weight, build(6).model[0].weight)
        check(build(5), 5)

    def test_parameters_that_the_optimizer_does_not_hold(self):
        def build(steps):
            task = make(steps=steps)
            task.optimizer = momentum(task.model[0].parameters())
            return task

        task = self.is_the_users(build, 6, every=2)
        identical(task.model[2].state_dict(), build(6).model[2].state_dict())
        check(build(5), 5)

    def test_tied_weights_stay_tied(self):
        task = self.is_the_users(lambda steps: architecture("tied", steps), 6, every=2, max_norm=0.1)
        assert task.model.out.weight is task.model.embedding.weight

    @parametrize("every", [1, 3])
    def test_micro_batches(self, every):
        batches = [data(4, 4, rows=5) for _ in range(6)]
        mine, yours = (make(eventful, train=batches) for _ in range(2))
        tuner = mine.tuner(every=every, micro_batches=4)
        torch.manual_seed(1)
        for batch in batches:
            tuner.step(batch, mine.val)
        torch.manual_seed(1)
        loop(yours, batches)
        for name, expected in yours.model.state_dict().items():
            error = mine.model.state_dict()[name] - expected
            assert error.double().norm() <= 1e-12 * expected.double().norm()
