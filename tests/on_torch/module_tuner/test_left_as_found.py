"""What `ModuleTuner` leaves as it was, and that it leaves nothing behind."""

import gc
import weakref

import pytest
import torch
from support.modules import (
    ESTIMATORS,
    OPTIMISERS,
    Grads,
    eventful,
    every_estimator,
    fit,
    identical,
    make,
    noisy_l2,
    snapshot,
)

parametrize = pytest.mark.parametrize


class TestLeftAsFound:
    @every_estimator
    @parametrize("put", [False, True], ids=["none", "users-own"])
    def test_gradients(self, estimator, put):
        task = make(eventful)
        tuner, grads = task.tuner(every=3, estimator=estimator(task.optimizer)), Grads(task, put)
        for batch in task.train[:6]:
            tuner.step(batch, task.val)
            grads.are_as_found()

    @every_estimator
    @parametrize("where", ["inner", "outer"])
    def test_modes_and_flags(self, estimator, where):
        task = make(eventful)
        loss = getattr(task, where)
        setattr(task, where, lambda model, *rest: loss(model.eval(), *rest))
        task.model[1].eval()
        task.model[0].bias.requires_grad_(False)
        found = snapshot(task)
        tuner = task.tuner(every=3, estimator=estimator(task.optimizer))
        for batch in task.train[:6]:
            tuner.step(batch, task.val)
            now = snapshot(task)
            identical([now["modes"], now["flags"]], [found["modes"], found["flags"]])

    def test_the_generator_after_draws_in_validation(self):
        task = make(outer=lambda model, h, b: fit(model, h, b) + 0.1 * torch.rand(()))
        found = torch.get_rng_state()
        tuner = task.tuner()
        for batch in task.train[:3]:
            tuner.step(batch, task.val)
        identical(torch.get_rng_state(), found)

    @parametrize("estimator", ["default", "full", "states", "implicit"])
    def test_buffers_move_once_a_step(self, estimator):
        task = make(eventful)
        tuner = task.tuner(every=3, estimator=ESTIMATORS[estimator](task.optimizer))
        for steps, batch in enumerate(task.train[:6], 1):
            tuner.step(batch, task.val)
            assert task.model[1].num_batches_tracked == steps


class Token:
    """Lives as long as the graph that it is part of."""

    alive = weakref.WeakSet()

    def __init__(self):
        self.alive.add(self)


class Marked(torch.autograd.Function):
    """The identity, with a token in its graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.token = Token()
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


class TestMemory:
    @parametrize("estimator", ["default", "full", "states"])
    def test_500_steps_leave_neither_tensors_nor_graphs(self, estimator):
        task = make(optimizer=OPTIMISERS["adam"])
        task.inner = lambda *args: Marked.apply(noisy_l2(*args))
        task.outer = lambda *args: Marked.apply(fit(*args))
        tuner = task.tuner(every=5, estimator=ESTIMATORS[estimator](task.optimizer))

        def run(steps):
            for i in range(steps):
                metrics = tuner.step(task.train[i % 10], task.val)
            assert metrics.estimate is not None and len(Token.alive) == 0
            return sum(issubclass(type(held), torch.Tensor) for held in gc.get_objects())

        gc.collect()
        gc.disable()
        try:
            assert run(20) == run(480)
        finally:
            gc.enable()
