"""A module trained by an optimiser of torch's own, with a tuner and without, and what is compared."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypergrad_torch import ModuleTuner
from torch import nn, optim
from torch.nn import functional as F

import hypergrad as hg
from support.differences import five_point

parametrize = pytest.mark.parametrize


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


def identical(mine, yours):
    """Bit for bit."""
    assert type(mine) is type(yours)
    if isinstance(mine, torch.Tensor):
        assert mine.dtype == yours.dtype and torch.equal(mine, yours)
    elif isinstance(mine, dict):
        assert mine.keys() == yours.keys()
        for key in mine:
            identical(mine[key], yours[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(yours)
        for pair in zip(mine, yours, strict=True):
            identical(*pair)
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
            identical(grad, value)


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
        return five_point(partial(at, name, i), h)

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
    "implicit": lambda optimizer: hg.Implicit(hg.Identity(), checks=hg.Checks(tolerance=float("inf"))),
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


class Boom(Exception):
    """Raised by a loss of the user's."""
