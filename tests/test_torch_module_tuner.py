"""`ModuleTuner`: hyperparameters tuned beside a module and an optimiser of torch's own."""

import copy
import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypergrad_torch import ModuleTuner
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def data(count, *shape, classes=3, rows=8):
    draw = partial(torch.randn, rows, *shape)
    return [{"x": draw(), "y": torch.randint(classes, (rows,)), "noise": draw()} for _ in range(count)]


def predict(model, batch, scale=0.0):
    shift = scale * batch["noise"]
    return model(batch["x"] + shift) if batch["x"].is_floating_point() else model(batch["x"], shift)


def fit(model, hparams, batch):
    return F.cross_entropy(predict(model, batch), batch["y"])


def fit_in_eval(model, hparams, batch):
    return fit(model.eval(), hparams, batch)


def noisy_l2(model, hparams, batch):
    squares = [p.square().sum() for p in model.parameters()]
    strength = hparams["log_l2"].exp()
    penalty = sum(strength[i % 3] * square for i, square in enumerate(squares))
    return F.cross_entropy(predict(model, batch, hparams["noise"]), batch["y"]) + penalty


def two_hparams():
    return {
        "log_l2": torch.tensor([-3.0, -2.0, -4.0], requires_grad=True),
        "noise": torch.tensor(0.3, requires_grad=True),
    }


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def eventful():
    """Buffers, draws and a forward hook."""
    norm, drop = nn.BatchNorm1d(6), nn.Dropout(0.3)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), drop, nn.Linear(6, 3))
    model[0].register_forward_hook(lambda module, args, out: 0.9 * out)
    return model


def halve_last(model):
    """A gradient hook, which copies of a parameter do not inherit."""
    list(model.parameters())[-1].register_hook(lambda g: 0.5 * g)


def momentum(params):
    return optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.01)


def groups(model):
    """Two parameter groups with rates and weight decays of their own."""
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.03, "weight_decay": 0.05}, {"params": rest}]


@dataclass
class Task:
    """What is handed to a tuner; ``train`` holds one batch for each step."""

    model: nn.Module
    optimizer: optim.Optimizer
    hparams: dict[str, Any]
    train: list[Any]
    val: Any
    inner: Callable = noisy_l2
    outer: Callable = fit
    prepare: Callable = lambda model: None

    def __post_init__(self):
        self.prepare(self.model)

    def tuner(self, **options):
        given = {"hyper_update": optim.SGD(named(self.hparams).values(), lr=0.0), "every": 1} | options
        return ModuleTuner(
            self.model, self.optimizer, self.hparams, inner=self.inner, outer=self.outer, **given
        )


def make(model=mlp, optimizer=momentum, shape=(4,), steps=10, seed=0, **given):
    torch.manual_seed(seed)
    built = model()
    given = {"hparams": two_hparams(), "train": data(steps, *shape), "val": data(1, *shape)[0]} | given
    return Task(built, optimizer(built.parameters()), **given)


def named(tree):
    """The tensors of a tree of hyperparameters, or of its hypergradient, by name."""
    found = {}
    for key, value in tree.items():
        parts = dict(value.named_parameters()) if isinstance(value, nn.Module) else value
        parts = {f".{name}": part for name, part in parts.items()} if isinstance(parts, dict) else {"": parts}
        found |= {key + name: part for name, part in parts.items()}
    return found


def loop(task, batches, hparams=None, max_norm=None, after=lambda: None):
    """The user's own training; a list is a batch in parts."""
    hparams = copy.deepcopy(task.hparams) if hparams is None else hparams
    for batch in batches:
        task.optimizer.zero_grad()
        parts = batch if isinstance(batch, list) else [batch]
        for part in parts:
            (task.inner(task.model, hparams, part) / len(parts)).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(task.model.parameters(), max_norm)
        task.optimizer.step()
        after()


def same(mine, yours):
    """Bit for bit."""
    assert type(mine) is type(yours)
    if isinstance(mine, torch.Tensor):
        assert mine.dtype == yours.dtype and torch.equal(mine, yours)
    elif isinstance(mine, dict):
        assert mine.keys() == yours.keys()
        for key in mine:
            same(mine[key], yours[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(yours)
        for pair in zip(mine, yours, strict=True):
            same(*pair)
    else:
        assert mine == yours


def snapshot(task, *others):
    """Everything that a call could change, but for ``.grad``."""
    modules = [task.model, *(h for h in task.hparams.values() if isinstance(h, nn.Module))]
    return copy.deepcopy(
        {
            "states": [owner.state_dict() for owner in (*modules, task.optimizer, *others)],
            "hparams": {name: h.detach() for name, h in named(task.hparams).items()},
            "flags": [t.requires_grad for t in tensors(task)],
            "modes": [m.training for module in modules for m in module.modules()],
            "generator": torch.get_rng_state(),
        }
    )


def tensors(task):
    return [*task.model.parameters(), *named(task.hparams).values()]


class Grads:
    """Whether every ``.grad`` is the object, with the values, that it was."""

    def __init__(self, task, put):
        self.task = task
        if put:
            for t in tensors(task):
                t.grad = torch.randn_like(t)
        self.found = [(t.grad, copy.deepcopy(t.grad)) for t in tensors(task)]

    def are_as_found(self):
        for t, (grad, value) in zip(tensors(self.task), self.found, strict=True):
            assert t.grad is grad
            same(grad, value)


@dataclass
class Start:
    """Where training stood: what differences are taken from."""

    model: nn.Module
    optimizer: optim.Optimizer
    draws: torch.Tensor

    @classmethod
    def of(cls, task):
        return cls(*copy.deepcopy((task.model, task.optimizer)), torch.get_rng_state())

    def end(self, task, batches, hparams, **options):
        """The model after training a copy by the user's loop."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.draws)
            again = Task(model, optimizer, hparams, [], task.val, task.inner, task.outer, task.prepare)
            loop(again, batches, hparams, **options)
        return model


def slopes(task, start, batches, value=None, h=1e-3, **options):
    """d value/dλ after real training, by five-point central differences, as pairs of index and slope.

    Every coordinate of small hyperparameters is taken, and five of large ones.
    """
    value = value or (lambda model, hparams: task.outer(model, hparams, task.val))

    def at(name, i, shift):
        hparams = copy.deepcopy(task.hparams)
        with torch.no_grad():
            named(hparams)[name].view(-1)[i] += shift
        return float(value(start.end(task, batches, hparams, **options), hparams).detach())

    def slope(name, i):
        near, far = (at(name, i, k * h) - at(name, i, -k * h) for k in (1, 2))
        return (8 * near - far) / (12 * h)

    index = {name: range(0, t.numel(), -(-t.numel() // 5)) for name, t in named(task.hparams).items()}
    return {name: (list(at), torch.tensor([slope(name, i) for i in at])) for name, at in index.items()}


def agree(hypergradient, expected, tolerance=1e-6):
    found = named(hypergradient)
    assert found.keys() == expected.keys()
    for name, (index, slope) in expected.items():
        assert slope.norm() > 0
        error = (found[name].reshape(-1)[index] - slope).norm() / slope.norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check(task, steps=1, unroll=1, value=None, estimator=None, **options):
    """The hypergradient of the last of these steps against real training of the last ``unroll``."""
    made = estimator and estimator(task.optimizer)
    tuner = task.tuner(every=steps, estimator=made, **options)
    for batch in task.train[: steps - unroll]:
        assert tuner.step(batch, task.val).estimate is None
    start, batches = Start.of(task), task.train[steps - unroll : steps]
    for batch in batches:
        metrics = tuner.step(batch, task.val)
    clip = {key: option for key, option in options.items() if key == "max_norm"}
    agree(metrics.estimate.hypergradient, slopes(task, start, batches, value, **clip))
    return metrics


ESTIMATORS = {
    "default": lambda optimizer: None,
    "gradient": lambda optimizer: hg.Greedy(optimizer, response="gradient"),
    "no-lookahead": lambda optimizer: hg.Greedy(optimizer, lookahead=False),
    "full": lambda optimizer: hg.Unrolled(optimizer, steps=3, tape=hg.Full()),
    "states": lambda optimizer: hg.Unrolled(optimizer, steps=3, tape=hg.States()),
    "implicit": lambda optimizer: hg.Implicit(hg.Identity(), tolerance=float("inf")),
}
every_estimator = parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)

FIRST_STEP = {
    "sgd": partial(optim.SGD, lr=0.1),
    "sgd-momentum": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd-dampening": partial(optim.SGD, lr=0.1, momentum=0.8, dampening=0.4),
    "sgd-maximize": partial(optim.SGD, lr=0.01, momentum=0.5, weight_decay=0.01, maximize=True),
}
WARM = {
    "adam": partial(optim.Adam, lr=0.02),
    "adam-decay-amsgrad": partial(optim.Adam, lr=0.02, betas=(0.8, 0.9), weight_decay=0.01, amsgrad=True),
    "adam-maximize": partial(optim.Adam, lr=0.01, weight_decay=0.01, maximize=True),
    "adamw": partial(optim.AdamW, lr=0.02, weight_decay=0.1),
    "adamw-amsgrad-maximize": partial(optim.AdamW, lr=0.01, amsgrad=True, maximize=True),
    "rmsprop": partial(optim.RMSprop, lr=0.01),
    "rmsprop-centered": partial(optim.RMSprop, lr=0.01, centered=True, momentum=0.5, weight_decay=0.01),
    "rmsprop-maximize": partial(optim.RMSprop, lr=0.005, maximize=True),
    "adagrad": partial(optim.Adagrad, lr=0.05, lr_decay=0.01, weight_decay=0.01),
    "adagrad-maximize": partial(optim.Adagrad, lr=0.02, initial_accumulator_value=0.1, maximize=True),
}
OPTIMISERS = FIRST_STEP | WARM


def grouped(rule, model=mlp, **given):
    task = make(model, **given)
    task.optimizer = rule(groups(task.model))
    return task


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
        same(*ends)
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
        same(task.model[0].weight, build(6).model[0].weight)
        check(build(5), 5)

    def test_parameters_that_the_optimizer_does_not_hold(self):
        def build(steps):
            task = make(steps=steps)
            task.optimizer = momentum(task.model[0].parameters())
            return task

        task = self.is_the_users(build, 6, every=2)
        same(task.model[2].state_dict(), build(6).model[2].state_dict())
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


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.block = nn.TransformerEncoderLayer(8, 2, 12, **options)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return self.out(self.block(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.groups = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.layer, self.out = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.layer((x + torch.tanh(self.groups(self.conv(x)))).flatten(1)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens, shift):
        return self.out(torch.tanh(self.mix(self.embedding(tokens) + shift)).mean(1))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    )


def drop_net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))


ARCHITECTURES = {
    "convolution-batchnorm": (conv_net, (1, 4, 4)),
    "dropout": (drop_net, (4,)),
    "transformer": (Encoder, (5, 8)),
    "lstm": (Recurrent, (5, 4)),
    "residual-layernorm-groupnorm": (Residual, (4, 2, 2)),
    "tied": (Tied, (3, 5)),
}


def architecture(name, steps=4, **given):
    model, shape = ARCHITECTURES[name]
    if name == "dropout":
        given["outer"] = fit_in_eval
    task = make(model, shape=shape, steps=steps, **given)
    if name == "tied":
        for batch in (*task.train, task.val):
            batch |= {"x": torch.randint(7, (8, 3)), "y": torch.randint(7, (8,))}
    return task


class TestArchitectures:
    @parametrize("rule", [momentum, OPTIMISERS["adam"]], ids=["sgd", "adam"])
    @parametrize("name", ARCHITECTURES)
    def test_against_central_differences(self, name, rule):
        check(architecture(name, optimizer=rule), 4)


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
            same(dict(hypergradient), seen[-1])
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
            same([now["modes"], now["flags"]], [found["modes"], found["flags"]])

    def test_the_generator_after_draws_in_validation(self):
        task = make(outer=lambda model, h, b: fit(model, h, b) + 0.1 * torch.rand(()))
        found = torch.get_rng_state()
        tuner = task.tuner()
        for batch in task.train[:3]:
            tuner.step(batch, task.val)
        same(torch.get_rng_state(), found)

    @parametrize("estimator", ["default", "full", "states", "implicit"])
    def test_buffers_move_once_a_step(self, estimator):
        task = make(eventful)
        tuner = task.tuner(every=3, estimator=ESTIMATORS[estimator](task.optimizer))
        for steps, batch in enumerate(task.train[:6], 1):
            tuner.step(batch, task.val)
            assert task.model[1].num_batches_tracked == steps


class Boom(Exception):
    """Raised by a loss of the user's."""


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
        same(snapshot(task, hyper), before)
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


class TestCheckpoints:
    def build(self, seed, model=eventful, estimator="default", **given):
        task = make(model, OPTIMISERS["adam"], seed=seed, **given)
        hyper = optim.Adam(named(task.hparams).values(), 0.05)
        made = ESTIMATORS[estimator](task.optimizer)
        return task, hyper, task.tuner(hyper_update=hyper, every=4, estimator=made)

    @parametrize("estimator", ["default", "full", "states", "implicit"])
    @parametrize("cut", [0, 1, 4, 5, 6])
    def test_a_run_resumes_bit_for_bit(self, cut, estimator, tmp_path):
        batches, val = data(10, 4), data(1, 4)[0]
        task, hyper, tuner = self.build(1, estimator=estimator)
        for step, batch in enumerate(batches):
            if step == cut:
                torch.save(tuner.state_dict(), tmp_path / "run.pt")
            tuner.step(batch, val)
        again, hyper2, resumed = self.build(2, estimator=estimator)
        with torch.no_grad():
            again.hparams["noise"].fill_(5.0)
        resumed.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True))
        for batch in batches[cut:]:
            resumed.step(batch, val)
        same(snapshot(again, hyper2), snapshot(task, hyper))

    OTHERS = {
        "narrower": {"model": drop_net},
        "deeper": {"model": lambda: nn.Sequential(eventful(), nn.Linear(3, 3))},
        "renamed": {"log_l2": [0.0] * 3, "scale": 0.3},
        "reshaped": {"log_l2": [0.0] * 4, "noise": 0.3},
    }

    @parametrize("other", OTHERS.values(), ids=OTHERS)
    def test_a_state_of_another_structure_is_refused(self, other):
        if "model" not in other:
            other = {"hparams": {name: torch.tensor(h, requires_grad=True) for name, h in other.items()}}
        self.refuses(self.build(1, **other)[2].state_dict())

    def test_a_state_with_nothing_in_it_is_refused(self):
        self.refuses({})

    def refuses(self, state):
        task, hyper, tuner = self.build(2)
        tuner.step(task.train[0], task.val)
        before = snapshot(task, hyper)
        with pytest.raises(errors.CheckpointError):
            tuner.load_state_dict(state)
        same(snapshot(task, hyper), before)


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


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        block = lambda x: torch.tanh(self.first(x))  # noqa: E731
        return self.last(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))


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
        same(mine.model.state_dict(), yours.model.state_dict())

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
        expected = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
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
        same(mine.model.state_dict(), yours.model.state_dict())

    def test_micro_batches_train_bit_for_bit(self):
        mine, yours = make(), make()
        batches = [[a, b] for a, b in zip(mine.train, mine.train[1:], strict=False)]
        tuner = mine.tuner(every=1, micro_batches=2)
        for batch in batches:
            tuner.step(batch, mine.val)
        loop(yours, batches)
        same(mine.model.state_dict(), yours.model.state_dict())

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
        mixed = hg.Greedy(rough.optimizer, mixed=hg.FiniteDifference())
        for k, batch in enumerate(exact.train[:4]):
            one = exact.tuner().step(batch, exact.val) if k == 3 else loop(exact, [batch])
            other = rough.tuner(estimator=mixed).step(batch, rough.val) if k == 3 else loop(rough, [batch])
        for name, g in named(one.estimate.hypergradient).items():
            found = named(other.estimate.hypergradient)[name]
            assert (found - g).norm() <= 1e-7 * g.norm()
        same(exact.model.state_dict(), rough.model.state_dict())

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
        same(snapshot(task), before)

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
        same(mine.model.state_dict(), yours.model.state_dict())


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
        same(snapshot(task, hyper), before)

    @parametrize("response", ["update", "gradient"])
    def test_gradient_hooks_with_micro_batches(self, response):
        task = make(prepare=halve_last)
        tuner = task.tuner(micro_batches=2, estimator=hg.Greedy(task.optimizer, response=response))
        with pytest.raises(errors.UnsupportedOpError, match="each micro-batch"):
            tuner.step(task.train[:2], task.val)
