"""Estimates and tuners on any device of torch."""

import re
from functools import partial

import optree
import pytest
import torch
from hypergrad_torch import ModuleTuner
from torch import nn, optim
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize
RULES = {
    "sgd": hg.SGD(0.1),
    "momentum": hg.SGD(0.1, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "nesterov": hg.SGD(0.1, momentum=0.9, nesterov=True),
    "learned-rate": hg.SGD(lambda h: h["noise"]),
    "adam": hg.Adam(0.02, weight_decay=0.01, amsgrad=True),
    "adamw": hg.AdamW(0.02),
    "rmsprop": hg.RMSprop(0.02, momentum=0.5, centered=True),
    "adagrad": hg.Adagrad(0.1, lr_decay=0.1),
    "clipped": hg.ClipNorm(hg.Adam(0.02), 0.5),
}
every_rule = parametrize("rule", RULES.values(), ids=RULES)
TRAINING = {
    "greedy": hg.Greedy,
    "gradient": partial(hg.Greedy, response="gradient"),
    "no-lookahead": partial(hg.Greedy, lookahead=False),
    "differences": partial(hg.Greedy, products=hg.FiniteDifference()),
    "one-sided-differences": partial(hg.Greedy, products=hg.FiniteDifference(sides=1)),
    "full": partial(hg.Unrolled, steps=3),
    "states": partial(hg.Unrolled, steps=3, tape=hg.States()),
    "truncated": partial(hg.Unrolled, steps=3, truncate=2),
    "truncated-states": partial(hg.Unrolled, steps=3, truncate=2, tape=hg.States()),
}
every_training = parametrize("make", TRAINING.values(), ids=TRAINING)
FORGIVING = float("inf")
IMPLICIT = {
    "cg": hg.Implicit(hg.Damped(hg.CG(6), 0.1), checks=hg.Checks(tolerance=FORGIVING)),
    "neumann": hg.Implicit(hg.Damped(hg.Neumann(6), 0.1), checks=hg.Checks(tolerance=FORGIVING)),
    "neumann-rtol": hg.Implicit(
        hg.Neumann(6, step_size=0.1, rtol=1e-2), checks=hg.Checks(tolerance=FORGIVING)
    ),
    "minres": hg.Implicit(hg.MINRES(6), checks=hg.Checks(tolerance=FORGIVING)),
    "gmres": hg.Implicit(hg.GMRES(6, restart=4), checks=hg.Checks(tolerance=FORGIVING)),
    "bicgstab": hg.Implicit(hg.BiCGStab(6), checks=hg.Checks(tolerance=FORGIVING)),
    "preconditioned": hg.Implicit(
        hg.CG(6, preconditioner=hg.Nystrom(4)), checks=hg.Checks(tolerance=FORGIVING)
    ),
    "direct": hg.Implicit(hg.Direct(), checks=hg.Checks(tolerance=FORGIVING)),
    "identity": hg.Implicit(hg.Identity(0.1), checks=hg.Checks(tolerance=FORGIVING)),
    "cg-differences": hg.Implicit(
        hg.CG(6), products=hg.FiniteDifference(), checks=hg.Checks(tolerance=FORGIVING)
    ),
}
every_implicit = parametrize("estimator", IMPLICIT.values(), ids=IMPLICIT)


def predict(params, x):
    return (x @ params["w"] + params["b"]).tanh() @ params["v"]


def fit(params, hparams, batch):
    return (predict(params, batch["x"]) - batch["y"]).square().mean()


def noisy_l2(params, hparams, batch):
    strengths = hparams["log_l2"].exp()
    squares = {name: p.square().sum() for name, p in params.items()}
    penalty = strengths[0] * (squares["w"] + squares["b"]) + strengths[1] * squares["v"]
    noisy = {"x": batch["x"] + hparams["noise"] * batch["noise"], "y": batch["y"]}
    return fit(params, hparams, noisy) + penalty


PROBLEM = hg.Bilevel(noisy_l2, fit)


def task(device, dtype=torch.float64):
    """Parameters, hyperparameters, T1 batches and a T2 batch: the same numbers on every device."""
    gen = torch.Generator().manual_seed(0)

    def put(tree):
        return optree.tree_map(lambda x: x.to(device, dtype), tree)

    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    params = {"w": draw(3, 4) / 4, "b": draw(4) / 4, "v": draw(4) / 4}
    hparams = {"log_l2": torch.tensor([1.0, 1.5]), "noise": torch.tensor(0.3)}
    batches = [{"x": draw(8, 3), "noise": draw(8, 3), "y": draw(8)} for _ in range(4)]
    return put((params, hparams, batches[:3], batches[3]))


def estimate(estimator, device, dtype=torch.float64, estimates=1):
    params, hparams, train, val = task(device, dtype)
    state = estimator.init(PROBLEM, params, hparams)
    for _ in range(estimates):
        batches = train[:1] if isinstance(estimator, hg.Implicit) else lambda t: train[t % 3]
        out = estimator.estimate(PROBLEM, state, hparams, batches, val)
        state = out.state
    return out


def tensors(tree):
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def lies_on(tree, device):
    """Nothing that was computed is anywhere else."""
    assert tensors(tree)
    for accessor, leaf in zip(optree.tree_accessors(tree), optree.tree_leaves(tree), strict=True):
        if isinstance(leaf, torch.Tensor):
            assert leaf.device.type == device, f"{accessor.codify('out')} is on {leaf.device}"
        else:
            assert isinstance(leaf, bool | int | float), accessor.codify("out")


def net(device, dtype=None):
    """An MLP with batch normalisation."""
    with torch.device(device):
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    return model.to(dtype)


def mlp(device, dtype=None):
    with torch.device(device):
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def classify(model, hparams, batch):
    return F.cross_entropy(model(batch["x"]), batch["label"])


def with_penalty(model, hparams, batch):
    noisy = batch | {"x": batch["x"] + hparams["noise"] * batch["noise"]}
    squares = sum(p.square().sum() for p in model.parameters())
    return classify(model, hparams, noisy) + hparams["log_l2"].exp().sum() * squares


def module_tuner(device, model, make=optim.Adam, dtype=torch.float64, estimator=None, **options):
    """A tuner, and a batch of T1 and one of T2."""
    torch.manual_seed(0)
    # Drawn on the CPU, so that the numbers are the same.
    model = model("cpu", dtype).to(device)
    _, hparams, train, val = task(device, dtype)
    hparams = {name: h.requires_grad_() for name, h in hparams.items()}
    optimizer, hyper = make(model.parameters(), lr=0.05), optim.Adam(hparams.values(), lr=0.01)
    labels = torch.randint(2, (8,)).to(device)
    given = {"inner": with_penalty, "outer": classify, "hyper_update": hyper, "every": 2} | options
    tuner = ModuleTuner(model, optimizer, hparams, estimator=estimator and estimator(optimizer), **given)
    return tuner, train[0] | {"label": labels}, val | {"label": labels}


MODULE_ESTIMATORS = {
    "default": None,
    "gradient": lambda optimizer: hg.Greedy(optimizer, response="gradient"),
    "differences": lambda optimizer: hg.Greedy(optimizer, products=hg.FiniteDifference()),
    "full": lambda optimizer: hg.Unrolled(optimizer, steps=2),
    "states": lambda optimizer: hg.Unrolled(optimizer, steps=2, tape=hg.States()),
    "implicit": lambda optimizer: hg.Implicit(hg.Identity(0.1), checks=hg.Checks(tolerance=FORGIVING)),
}
every_module_estimator = parametrize("estimator", MODULE_ESTIMATORS.values(), ids=MODULE_ESTIMATORS)
OPTIMISERS = {
    "sgd": partial(optim.SGD, momentum=0.9),
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "rmsprop": partial(optim.RMSprop, centered=True, momentum=0.5),
    "adagrad": optim.Adagrad,
}


def misplaced(first, second):
    """Arguments of an estimate on one device, one hyperparameter on another."""
    params, hparams, train, val = task(first)
    return params, hparams | {"noise": hparams["noise"].to(second)}, train, val


def refuses_two_devices(first, second):
    params, hparams, train, val = misplaced(first, second)
    for estimator in (hg.Greedy(hg.SGD(0.1)), hg.Implicit()):
        with pytest.raises(errors.LeafTypeError) as caught:
            estimator.init(PROBLEM, params, hparams)
        assert "hparams['noise']" in str(caught.value)
        assert f"device {first}" in str(caught.value) and f"device {second}" in str(caught.value)
        with pytest.raises(errors.LeafTypeError, match=re.escape("hparams['noise']")):
            estimator.estimate(PROBLEM, hg.State(params), hparams, train[0], val)
    mixed = params | {"w": params["w"].to(second)}
    with pytest.raises(errors.LeafTypeError, match=re.escape("params['w']")):
        hg.Greedy(hg.SGD(0.1)).init(PROBLEM, mixed, task(first)[1])
    model = mlp(first, torch.float64)
    hparams = {name: h.requires_grad_() for name, h in task(second)[1].items()}
    options = {"inner": with_penalty, "outer": classify, "hyper_update": optim.SGD(hparams.values())}
    with pytest.raises(errors.LeafTypeError, match=r"hparams\['log_l2'\].*params\['0.bias'\]"):
        ModuleTuner(model, optim.SGD(model.parameters()), hparams, **options)
