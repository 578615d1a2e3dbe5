"""Torch without a wrapper: functional modules, the tuner on tensors, precision, memory."""

import gc
import resource

import numpy as np
import pytest
import torch
from hypergrad_torch import ModuleTuner
from torch import nn
from torch.func import functional_call

import hypergrad as hg
from hypergrad import errors
from hypergrad.backend import get_backend
from hypergrad.demo import network
from hypergrad.demo.data import load

TORCH = get_backend("torch")


class Tied(nn.Module):
    """A net that decodes with the weights that it encodes with, under two names."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.norm(torch.tanh(self.encode(x))))


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class TestModules:
    def test_a_module_by_functional_call(self):
        torch.manual_seed(0)
        model = Tied().double()
        params = {name: p.detach() for name, p in model.named_parameters()}
        assert len(params) == 5  # the shared weight counts once

        def judge(params, hparams, batch):
            return nn.functional.mse_loss(functional_call(model, params, batch[0]), batch[1])

        def train(params, hparams, batch):
            penalty = sum(torch.sum(p**2) for p in params.values())
            return judge(params, hparams, batch) + torch.exp(hparams) * penalty

        batch, val = (draw(8, 4), draw(8, 4, seed=1)), (draw(8, 4, seed=2), draw(8, 4, seed=3))
        problem, lam = hg.Bilevel(train, judge), torch.tensor(-3.0, dtype=torch.float64)
        found = hg.check_hypergradient(
            problem, params, lam, lambda t: batch, val, hg.Unrolled(hg.Adam(0.05), 4)
        )
        assert found.relative_error <= 1e-6
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


class TestTuner:
    @staticmethod
    def run(name, steps, **given):
        backend, data = get_backend(name), load("digits", 0)
        problem = network.bilevel(backend)
        space = {"log_l2": hg.Real(), "noise": hg.NonNegative()}
        tuner = hg.Tuner(problem, hg.Greedy(hg.Adam(0.01)), space, every=3, **given)
        params = network.init_params(backend, data.train, 0)
        train, val = (network.minibatches(backend, part, 20, 1) for part in (data.train, data.val))
        return tuner, tuner.run(params, network.init_hparams(backend, -6.0, 0.1), train, val, steps)

    def test_it_tunes_as_numpy_does(self):
        _, mine = self.run("torch", 30)
        _, other = self.run("numpy", 30)
        np.testing.assert_allclose(TORCH.to_numpy(mine.hparams["log_l2"]), other.hparams["log_l2"], rtol=1e-9)
        for layer, same in zip(mine.params, other.params, strict=True):
            np.testing.assert_allclose(TORCH.to_numpy(layer["w"]), same["w"], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(mine.history.inner_values, other.history.inner_values, rtol=1e-9)

    def test_it_saves_and_resumes(self, tmp_path):
        tuner, half = self.run("torch", 15)
        tuner.save(tmp_path / "half.npz", half)
        data = load("digits", 0)
        start = network.init_params(TORCH, data.train, 0), network.init_hparams(TORCH, -6.0, 0.1)
        train, val = (network.minibatches(TORCH, part, 20, 1) for part in (data.train, data.val))
        again = tuner.run(*start, train, val, 30, resume=tuner.load(tmp_path / "half.npz", *start))
        _, whole = self.run("torch", 30)
        for mine, other in zip(TORCH.flatten(again.params)[0], TORCH.flatten(whole.params)[0], strict=True):
            assert torch.equal(mine, other)

    def test_a_space_keeps_the_noise_inside_and_the_history_says_so(self):
        _, run = self.run("torch", 30, hyper_update=hg.SGD(100.0))
        assert min(run.history.values["hparams['noise']"]) >= 0
        assert sum(run.history.clipped) > 0


class TestPrecision:
    def losses(self, dtype):
        def judge(params, hparams, batch):
            return torch.mean((torch.tanh(batch[0] @ params["w"]) @ params["v"] - batch[1]) ** 2)

        def train(params, hparams, batch):
            return judge(params, hparams, batch) + torch.exp(hparams) * torch.sum(params["w"] ** 2)

        params = {"w": draw(4, 6, dtype=dtype), "v": draw(6, seed=1, dtype=dtype)}
        batch = draw(16, 4, seed=2, dtype=dtype), draw(16, seed=3, dtype=dtype)
        return hg.Bilevel(train, judge), params, torch.tensor(-1.0, dtype=dtype), batch

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_keeps_its_type(self, dtype):
        problem, params, lam, batch = self.losses(dtype)
        g = hg.hypergradient(problem, params, lam, batch, batch, hg.Greedy(hg.SGD(0.1)))
        exact = hg.hypergradient(
            *self.losses(torch.float64)[:3], *[self.losses(torch.float64)[3]] * 2, hg.Greedy(hg.SGD(0.1))
        )
        assert g.dtype == dtype
        assert abs(g.double() - exact) <= 0.1 * abs(exact)

    def test_a_loss_in_float32_of_half_precision_parameters(self):
        problem, params, lam, batch = self.losses(torch.float16)
        wide = hg.Bilevel(*(lambda p, h, b, f=f: f(p, h, b).float() for f in (problem.inner, problem.outer)))
        g = hg.hypergradient(wide, params, lam, batch, batch, hg.Greedy(hg.SGD(0.1)))
        assert g.dtype == torch.float16

    @pytest.mark.parametrize("where", ["T1", "T2"])
    def test_an_overflow_in_half_precision_advises_float32(self, where):
        problem, params, lam, batch = self.losses(torch.float16)
        huge = lambda f: lambda p, h, b: f(p, h, b) * 30000.0 * 30000.0  # noqa: E731
        spoilt = hg.Bilevel(
            huge(problem.inner) if where == "T1" else problem.inner,
            huge(problem.outer) if where == "T2" else problem.outer,
        )
        with pytest.raises(errors.NonFiniteError, match="float32") as caught:
            hg.hypergradient(spoilt, params, lam, batch, batch, hg.Greedy(hg.SGD(0.1)))
        assert caught.value.where == where

    def test_bfloat16_autocast_in_a_module(self):
        def metrics(autocast):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
            lam = torch.tensor(-2.0, requires_grad=True)

            def judge(model, lam, batch):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    return nn.functional.mse_loss(model(batch[0]).float(), batch[1])

            def train(model, lam, batch):
                return judge(model, lam, batch) + torch.exp(lam) * sum(
                    p.square().sum() for p in model.parameters()
                )

            optimizer, hyper = torch.optim.Adam(model.parameters(), 0.01), torch.optim.SGD([lam], 0.0)
            tuner = ModuleTuner(model, optimizer, lam, inner=train, outer=judge, hyper_update=hyper, every=2)
            batch = draw(16, 8, dtype=torch.float32), draw(16, 4, seed=1, dtype=torch.float32)
            return [tuner.step(batch, batch) for _ in range(4)][-1]

        half, single = metrics(True), metrics(False)
        assert half.inner_value != single.inner_value
        mine, other = half.estimate.hypergradient, single.estimate.hypergradient
        assert abs(mine - other) <= 0.1 * abs(other)


class TestMemory:
    def test_500_estimates_leave_neither_tensors_nor_pages(self):
        problem, params, lam, batch = TestPrecision().losses(torch.float64)
        params["w"] = torch.cat([params["w"], draw(4, 20_000, seed=5)], 1)
        params["v"] = torch.cat([params["v"], draw(20_000, seed=6)])
        tuner = hg.Tuner(problem, hg.Greedy(hg.Adam(1e-3)), every=5)
        state = [tuner.init(params, lam)]

        def run(steps):
            for _ in range(steps):
                state[0], _ = tuner.step(state[0], batch, batch)
            tensors = sum(issubclass(type(held), torch.Tensor) for held in gc.get_objects())
            return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        gc.collect()
        gc.disable()
        try:
            (tensors, pages), (later, more) = run(20), run(480)
        finally:
            gc.enable()
        assert later == tensors
        assert more - pages <= 20 * 1024  # KiB; one set of parameters a step would be 380 MiB


class TestDistributed:
    def test_a_data_parallel_module_is_refused(self, tmp_path):
        distributed = torch.distributed
        if not distributed.is_available():
            pytest.skip("torch was built without torch.distributed")
        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
        )
        try:
            model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
            lam = torch.tensor(0.0, requires_grad=True)
            loss = lambda model, lam, batch: (model(batch) ** 2).mean() + lam  # noqa: E731
            given = torch.optim.SGD(model.parameters(), 0.1), lam
            with pytest.raises(errors.UnsupportedOpError, match="ddp.module"):
                ModuleTuner(model, *given, inner=loss, outer=loss, hyper_update=torch.optim.SGD([lam], 0.1))
        finally:
            distributed.destroy_process_group()
