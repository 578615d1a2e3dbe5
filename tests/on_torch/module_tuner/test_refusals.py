"""What `ModuleTuner` refuses."""

import re

import pytest
import torch
from support.modules import ESTIMATORS, Boom, check, halve_last, identical, make, momentum, named, snapshot
from torch import nn, optim

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


class TestRefusals:
    @parametrize("rule", [optim.LBFGS, optim.NAdam])
    def test_an_optimiser_that_is_not_differentiated(self, rule):
        task = make(optimizer=rule)
        with pytest.raises(hg.HypergradError) as caught:
            task.tuner().step(task.train[0], task.val)
        assert isinstance(caught.value, NotImplementedError | ValueError)
        for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad"):
            assert re.search(rf"\b{name}\b", str(caught.value))
        assert re.search("response=['\"]gradient['\"]", str(caught.value))

    @parametrize("every", [0, -1, 2.5, "10", None], ids=repr)
    def test_a_period_that_is_no_positive_integer(self, every):
        with pytest.raises(errors.ArgumentError, match="every"):
            make().tuner(every=every)

    def test_an_integer_hyperparameter(self):
        task = make()
        hyper = optim.SGD(task.hparams.values(), 0.1)
        task.hparams = task.hparams | {"count": torch.tensor(3)}
        with pytest.raises(TypeError, match=re.escape("hparams['count']")):
            task.tuner(hyper_update=hyper)

    def test_an_optimizer_of_other_parameters(self):
        task = make()
        task.optimizer = momentum([*task.model.parameters(), nn.Parameter(torch.zeros(2))])
        with pytest.raises(errors.ArgumentError):
            task.tuner()

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_a_compiled_module(self):
        task = make()
        task.model = torch.compile(task.model)
        with pytest.raises(errors.UnsupportedOpError, match="compile"):
            task.tuner()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        block = lambda x: torch.tanh(self.first(x))  # noqa: E731
        return self.last(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))


class TestOddRefusals:
    @parametrize("estimator", [None, ESTIMATORS["full"]], ids=["greedy", "full"])
    def test_checkpoints(self, estimator):
        task = make(Checkpointed)
        tuner = task.tuner(every=3, estimator=estimator and estimator(task.optimizer))
        for batch in task.train[:2]:
            tuner.step(batch, task.val)
        with pytest.raises(errors.UnsupportedOpError, match="checkpoint"):
            tuner.step(task.train[2], task.val)

    def test_weight_norm_where_its_second_derivative_matters(self):
        def normed():
            layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
            return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))

        check(make(normed), 2)  # one step needs none
        task = make(normed)
        tuner = task.tuner(every=3, estimator=ESTIMATORS["full"](task.optimizer))
        with pytest.raises(errors.UnsupportedOpError, match="weight_norm"):
            for batch in task.train[:3]:
                tuner.step(batch, task.val)

    def test_hooks_around_the_step(self):
        task = make()
        task.optimizer.register_step_pre_hook(lambda *args: None)
        with pytest.raises(errors.UnsupportedOpError, match="hooks around"):
            task.tuner().step(task.train[0], task.val)

    @pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
    def test_one_tensor_in_two_roles(self):
        shared = torch.tensor(0.3, requires_grad=True)
        with pytest.raises(errors.ArgumentError, match="noise.*also.*log_l2|log_l2.*also.*noise"):
            make(hparams={"log_l2": shared, "noise": shared}).tuner(hyper_update=optim.SGD([shared], 0.1))
        task = make()
        task.hparams = {"weight": task.model[0].weight}
        with pytest.raises(errors.ArgumentError, match="optimizer trains"):
            task.tuner()

    @parametrize("max_norm", [0.0, -1.0, True, float("nan")])
    def test_what_is_no_norm(self, max_norm):
        with pytest.raises(errors.ArgumentError, match="max_norm"):
            make().tuner(max_norm=max_norm)

    def test_a_failing_hyper_optimizer_leaves_everything(self):
        task = make()
        hyper = optim.SGD(named(task.hparams).values(), 0.1)

        def fail(*args):
            raise Boom

        hyper.register_step_post_hook(fail)
        before = snapshot(task, hyper)
        with pytest.raises(Boom):
            task.tuner(hyper_update=hyper).step(task.train[0], task.val)
        identical(snapshot(task, hyper), before)

    @parametrize("response", ["update", "gradient"])
    def test_gradient_hooks_with_micro_batches(self, response):
        task = make(prepare=halve_last)
        tuner = task.tuner(micro_batches=2, estimator=hg.Greedy(task.optimizer, response=response))
        with pytest.raises(errors.UnsupportedOpError, match="each micro-batch"):
            tuner.step(task.train[:2], task.val)
