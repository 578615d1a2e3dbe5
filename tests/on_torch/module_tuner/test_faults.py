"""Steps of `ModuleTuner` that fail."""

import pytest
import torch
from support.modules import (
    ESTIMATORS,
    Boom,
    Grads,
    eventful,
    fit,
    identical,
    make,
    named,
    noisy_l2,
    snapshot,
    tensors,
    two_hparams,
)
from torch import optim

from hypergrad import errors

parametrize = pytest.mark.parametrize


def faulty(loss):
    """Raise where the batch is ``bad``, after the model has run."""

    def raising(model, hparams, batch):
        value = loss(model, hparams, batch)
        if "bad" in batch:
            raise batch["bad"]
        return value

    return raising


class TestFaults:
    """A step that fails leaves everything as it was before the call."""

    def fails(self, task, expected, train, val, warm=0, every=1, estimator=None, put=True):
        hyper = optim.Adam(named(task.hparams).values(), 1e-2)
        made = estimator and estimator(task.optimizer)
        tuner = task.tuner(every=every, hyper_update=hyper, estimator=made)
        for batch in task.train[:warm]:
            tuner.step(batch, task.val)
        grads, before = Grads(task, put), snapshot(task, hyper)
        with pytest.raises(expected) as caught:
            tuner.step(train, val)
        identical(snapshot(task, hyper), before)
        grads.are_as_found()
        return caught.value, tuner

    CASES = {
        "T1-between": ("T1", 0, 10, None),
        "T1-between-warm": ("T1", 2, 10, None),
        "T1-first": ("T1", 0, 1, None),
        "T1-warm": ("T1", 2, 3, None),
        "T1-unroll": ("T1", 4, 5, ESTIMATORS["full"]),
        "T2-first": ("T2", 0, 1, None),
        "T2-warm": ("T2", 2, 3, None),
        "T2-full": ("T2", 4, 5, ESTIMATORS["full"]),
        "T2-states": ("T2", 4, 5, ESTIMATORS["states"]),
        "T2-implicit": ("T2", 2, 3, ESTIMATORS["implicit"]),
    }
    every_case = parametrize("where, warm, every, estimator", CASES.values(), ids=CASES)

    @every_case
    def test_a_loss_that_is_nan(self, where, warm, every, estimator):
        task = make(eventful)
        good = task.train[warm]
        batches = {"T1": good, "T2": task.val}
        batches[where] = batches[where] | {"x": batches[where]["x"] * torch.nan}
        error, tuner = self.fails(task, errors.NonFiniteError, *batches.values(), warm, every, estimator)
        assert error.where == where
        tuner.step(good, task.val)
        assert all(p.isfinite().all() for p in tensors(task))

    @every_case
    def test_an_exception_in_a_loss(self, where, warm, every, estimator):
        task = make(eventful, inner=faulty(noisy_l2), outer=faulty(fit))
        boom = Boom("the user's own")
        batches = {"T1": task.train[warm], "T2": task.val}
        batches[where] = batches[where] | {"bad": boom}
        assert self.fails(task, Boom, *batches.values(), warm, every, estimator)[0] is boom

    @parametrize("put", [False, True], ids=["none", "users-own"])
    @parametrize("estimator", [None, ESTIMATORS["states"]], ids=["default", "states"])
    def test_a_hyperparameter_that_no_loss_uses(self, estimator, put):
        task = make(eventful, hparams=two_hparams() | {"idle": torch.tensor(1.0, requires_grad=True)})
        call = (task.train[2], task.val, 2, 3, estimator, put)
        error, _ = self.fails(task, errors.DisconnectedError, *call)
        assert error.path == "hparams['idle']" and "hparams['idle']" in str(error)
