"""Tensors on CUDA, where there is such a device."""

import copy
from contextlib import contextmanager

import optree
import pytest
import torch
from support.devices import (
    FORGIVING,
    IMPLICIT,
    OPTIMISERS,
    PROBLEM,
    RULES,
    TRAINING,
    estimate,
    fit,
    lies_on,
    module_tuner,
    net,
    noisy_l2,
    refuses_two_devices,
    task,
    tensors,
)

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


@contextmanager
def no_waiting():
    """Raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestCuda:
    DEVICE = "cuda"

    def agree(self, mine, expected, tolerance=1e-10):
        for a, b in zip(tensors(mine), tensors(expected), strict=True):
            assert (a.cpu() - b).double().norm() <= tolerance * b.double().norm()

    @parametrize("make", [TRAINING[name] for name in ("greedy", "gradient", "full", "states", "truncated")])
    @parametrize("name", ["momentum", "adam", "rmsprop", "clipped"])
    def test_estimators_that_train(self, name, make):
        estimator = make(RULES[name])
        mine, expected = (estimate(estimator, device, estimates=3) for device in (self.DEVICE, "cpu"))
        self.agree(mine.hypergradient, expected.hypergradient)
        self.agree((mine.state, mine.outer_value), (expected.state, expected.outer_value))
        lies_on(mine, self.DEVICE)

    def test_differences(self):
        # They amplify the rounding in which devices differ.
        estimator = TRAINING["differences"](RULES["momentum"])
        mine, expected = (estimate(estimator, device) for device in (self.DEVICE, "cpu"))
        self.agree(mine.hypergradient, expected.hypergradient, 1e-7)
        assert estimator.check(mine) is mine

    @parametrize("name", ["cg", "neumann", "direct", "identity"])
    def test_implicit(self, name):
        estimator = (
            hg.Implicit(hg.CG(rtol=1e-12), checks=hg.Checks(tolerance=FORGIVING))
            if name == "cg"
            else IMPLICIT[name]
        )
        mine, expected = (estimate(estimator, device) for device in (self.DEVICE, "cpu"))
        self.agree(mine.hypergradient, expected.hypergradient)
        assert estimator.check(mine) is mine

    def test_module_tuner(self):
        ends = []
        for device in (self.DEVICE, "cpu"):
            tuner, train, val = module_tuner(device, net)
            for _ in range(6):
                metrics = tuner.step(train, val)
            ends.append((dict(tuner.model.state_dict()), tuner.hparams, metrics.outer_value))
        self.agree(*ends)

    def test_faults_are_raised_once_asked_for(self):
        params, hparams, train, val = task(self.DEVICE)
        estimator = hg.Greedy(hg.SGD(0.1))
        state = estimator.init(PROBLEM, params, hparams)
        out = estimator.estimate(PROBLEM, state, hparams, train[0], val | {"y": val["y"] * torch.nan})
        with pytest.raises(errors.NonFiniteError) as caught:
            estimator.check(out)
        assert caught.value.where == "T2"

    def test_two_devices_are_refused(self):
        refuses_two_devices("cpu", f"{self.DEVICE}:0")

    @parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_its_own_generator_is_replayed(self, tape):
        # Where a step is taken again it draws the same noise: the tapes agree, and so do two estimates.
        def drawn(params, hparams, batch):
            return noisy_l2(params, hparams, batch | {"noise": torch.randn_like(batch["x"])})

        params, hparams, train, val = task(self.DEVICE)
        problem = hg.Bilevel(drawn, fit)

        def once(tape):
            torch.manual_seed(3)
            estimator = hg.Unrolled(hg.Adam(0.02), 3, tape=tape)
            state = estimator.init(problem, params, hparams)
            return estimator.estimate(problem, state, hparams, train, val), torch.rand((), device=self.DEVICE)

        (out, after), (full, after_full) = once(tape), once(hg.Full())
        self.agree(out.hypergradient, optree.tree_map(torch.Tensor.cpu, full.hypergradient))
        assert torch.equal(after, after_full)
        before = torch.cuda.get_rng_state()
        with pytest.raises(errors.ArgumentError):
            once_failing = hg.Bilevel(lambda *args: drawn(*args).expand(2), fit)
            hg.hypergradient(once_failing, params, hparams, train[0], val, hg.Greedy(hg.SGD(0.1)))
        assert torch.equal(torch.cuda.get_rng_state(), before)

    @parametrize("make", [TRAINING[name] for name in ("greedy", "gradient", "differences")])
    @parametrize("name", ["momentum", "learned-rate", "adam", "clipped"])
    def test_greedy_does_not_wait(self, name, make):
        params, hparams, train, val = task(self.DEVICE)
        estimator = make(RULES[name])
        state = estimator.init(PROBLEM, params, hparams)
        out = estimator.estimate(PROBLEM, state, hparams, train[0], val)  # libraries set up
        with no_waiting():
            estimator.estimate(PROBLEM, out.state, hparams, train[1], val)

    @parametrize("name", ["sgd", "adam", "rmsprop"])
    @parametrize("response", ["update", "gradient"])
    def test_module_tuner_does_not_wait(self, response, name):
        estimator = lambda optimizer: hg.Greedy(optimizer, response)  # noqa: E731
        options = {"estimator": estimator, "max_norm": 0.5}
        tuner, train, val = module_tuner(self.DEVICE, net, OPTIMISERS[name], **options)
        tuner.step(train, val)
        tuner.step(train, val)
        with no_waiting():
            tuner.step(train, val)
            assert tuner.step(train, val).estimate is not None

    def test_a_run_resumes_bit_for_bit(self):
        tuner, train, val = module_tuner(self.DEVICE, net)
        tuner.step(train, val)
        saved = copy.deepcopy(tuner.state_dict())
        ends = []
        for _ in range(2):
            tuner.load_state_dict(copy.deepcopy(saved))
            for _ in range(3):
                tuner.step(train, val)
            ends.append(copy.deepcopy((tuner.model.state_dict(), tuner.hparams)))
        assert all(map(torch.equal, *(tensors((dict(model), hparams)) for model, hparams in ends)))
