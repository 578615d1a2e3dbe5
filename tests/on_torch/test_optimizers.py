"""Optimisers of torch as update rules, and update rules beside the optimisers of torch that they name.

Expected values come from torch's own steps on parameters, expected slopes from differences of such training.
"""

import re
from functools import partial

import numpy as np
import optree
import pytest
import torch
from support.differences import five_point
from support.frameworks import BACKENDS
from torch import nn, optim
from torch.nn.utils import clip_grad_norm_

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize
STEPS = 5

OPTIMISERS = {
    "sgd": partial(optim.SGD, lr=0.1),
    "sgd-decay": partial(optim.SGD, lr=0.1, weight_decay=0.05),
    "sgd-momentum": partial(optim.SGD, lr=0.1, momentum=0.9),
    "sgd-dampening": partial(optim.SGD, lr=0.1, momentum=0.8, dampening=0.4, weight_decay=0.05),
    "sgd-nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "sgd-maximize": partial(optim.SGD, lr=0.02, momentum=0.5, weight_decay=0.05, maximize=True),
    "adam": partial(optim.Adam, lr=0.05),
    "adam-decay": partial(optim.Adam, lr=0.05, betas=(0.8, 0.9), weight_decay=0.05),
    "adam-amsgrad": partial(optim.Adam, lr=0.05, betas=(0.8, 0.7), eps=1e-3, amsgrad=True, weight_decay=0.05),
    "adam-maximize": partial(optim.Adam, lr=0.02, weight_decay=0.05, maximize=True),
    "adamw": partial(optim.AdamW, lr=0.05, weight_decay=0.2),
    "adamw-amsgrad": partial(optim.AdamW, lr=0.05, betas=(0.8, 0.7), eps=1e-3, amsgrad=True),
    "adamw-maximize": partial(optim.AdamW, lr=0.02, maximize=True),
    "rmsprop": partial(optim.RMSprop, lr=0.02),
    "rmsprop-centered": partial(optim.RMSprop, lr=0.02, alpha=0.8, eps=1e-3, centered=True),
    "rmsprop-momentum": partial(optim.RMSprop, lr=0.02, alpha=0.9, momentum=0.5, weight_decay=0.05),
    "rmsprop-everything": partial(
        optim.RMSprop, lr=0.02, alpha=0.9, eps=1e-3, momentum=0.5, weight_decay=0.05, centered=True
    ),
    "rmsprop-maximize": partial(optim.RMSprop, lr=0.01, maximize=True),
    "adagrad": partial(optim.Adagrad, lr=0.1),
    "adagrad-lr-decay": partial(optim.Adagrad, lr=0.1, lr_decay=0.3, eps=1e-3),
    "adagrad-accumulator": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1, weight_decay=0.05),
    "adagrad-maximize": partial(optim.Adagrad, lr=0.05, maximize=True),
}
every_optimiser = parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)

# Rules of one's own, and the optimiser of torch that each is.
RULES = {
    "sgd-dampening": (hg.SGD(0.1, momentum=0.8, weight_decay=0.05, dampening=0.4), "sgd-dampening"),
    "sgd-nesterov": (hg.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.05), "sgd-nesterov"),
    "adam": (hg.Adam(0.05), "adam"),
    "adam-amsgrad": (hg.Adam(0.05, 0.8, 0.7, 1e-3, 0.05, amsgrad=True), "adam-amsgrad"),
    "adamw": (hg.AdamW(0.05, weight_decay=0.2), "adamw"),
    "adamw-amsgrad": (hg.AdamW(0.05, 0.8, 0.7, 1e-3, amsgrad=True), "adamw-amsgrad"),
    "rmsprop": (hg.RMSprop(0.02), "rmsprop"),
    "rmsprop-centered": (hg.RMSprop(0.02, 0.8, 1e-3, centered=True), "rmsprop-centered"),
    "rmsprop-everything": (hg.RMSprop(0.02, 0.9, 1e-3, 0.5, 0.05, centered=True), "rmsprop-everything"),
    "adagrad": (hg.Adagrad(0.1), "adagrad"),
    "adagrad-lr-decay": (hg.Adagrad(0.1, lr_decay=0.3, eps=1e-3), "adagrad-lr-decay"),
    "adagrad-accumulator": (
        hg.Adagrad(0.1, weight_decay=0.05, initial_accumulator=0.1),
        "adagrad-accumulator",
    ),
}
every_rule = parametrize(("rule", "name"), RULES.values(), ids=RULES)

# Norms to clip at: below those of all gradients of the training, between them, and above them.
ALWAYS, SOMETIMES, NEVER = 0.05, 1.2, 1e3
every_norm = parametrize("max_norm", [ALWAYS, SOMETIMES, NEVER], ids=["always", "sometimes", "never"])

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 4)) / 2, "b": RNG.normal(size=4) / 2, "v": RNG.normal(size=4) / 2}
HPARAMS = {"log_l2": np.array([-2.0, -3.0])}
BATCHES = [{"x": RNG.normal(size=(8, 3)), "y": RNG.normal(size=8)} for _ in range(STEPS + 1)]


def problem(xp):
    """Regression by a small tanh net with a penalty for each layer."""

    def outer(params, hparams, b):
        residual = xp.tanh(b["x"] @ params["w"] + params["b"]) @ params["v"] - b["y"]
        return xp.mean(residual * residual)

    def inner(params, hparams, b):
        strengths = xp.exp(hparams["log_l2"])
        penalty = strengths[0] * xp.sum(params["w"] ** 2) + strengths[1] * xp.sum(params["v"] ** 2)
        return outer(params, hparams, b) + penalty

    return hg.Bilevel(inner, outer)


PROBLEM = problem(torch)


def on_torch(tree):
    if isinstance(tree, list):
        return [on_torch(part) for part in tree]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in tree.items()}


def clones(params):
    return [p.clone().requires_grad_() for p in params.values()]


def really(make, steps, hparams=None, max_norm=None, seen=None):
    """Parameters after steps of torch's own; ``seen`` collects the norms that were clipped."""
    params = {name: nn.Parameter(p) for name, p in on_torch(PARAMS).items()}
    hparams, optimizer = hparams or on_torch(HPARAMS), make(params.values())
    for batch in on_torch(BATCHES)[:steps]:
        optimizer.zero_grad()
        PROBLEM.inner(params, hparams, batch).backward()
        if max_norm is not None:
            norm = clip_grad_norm_(params.values(), max_norm)
            if seen is not None:
                seen.append(float(norm))
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def slopes(train, h=1e-3):
    """dC2/dλ after ``train(hparams)``, by five-point central differences."""

    def at(i, shift):
        hparams = on_torch(HPARAMS)
        hparams["log_l2"][i] += shift
        return float(PROBLEM.outer(train(hparams), hparams, on_torch(BATCHES)[-1]))

    return np.array([five_point(partial(at, i), h) for i in range(2)])


def estimate(estimator, steps=1, backend=None):
    """The last of so many estimates, one after the other through the batches."""
    backend = backend or BACKENDS["torch"]

    def put(tree):
        return backend.map(backend.asarray, tree)

    params, hparams, batches = (put(tree) for tree in (PARAMS, HPARAMS, BATCHES))
    task, out = problem(backend.xp), None
    state = estimator.init(task, params, hparams)
    for _ in range(steps):
        out = estimator.estimate(task, state, hparams, lambda t: batches[t], batches[-1])
        state = out.state
    return out


def values_agree(params, expected, tolerance=1e-12):
    for name, value in expected.items():
        assert (params[name] - value).norm() <= tolerance * value.norm(), name


def slopes_agree(out, expected, tolerance=1e-6):
    found = out.hypergradient["log_l2"].numpy()
    assert np.linalg.norm(expected) > 1e-8
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def after_one_step_from(make, warm, max_norm=None):
    """Training whose last step alone sees the hyperparameters, as greedy has it."""

    def train(hparams):
        params = {name: nn.Parameter(p) for name, p in on_torch(PARAMS).items()}
        optimizer = make(params.values())
        for t, batch in enumerate(on_torch(BATCHES)[: warm + 1]):
            optimizer.zero_grad()
            PROBLEM.inner(params, hparams if t == warm else on_torch(HPARAMS), batch).backward()
            if max_norm is not None:
                clip_grad_norm_(params.values(), max_norm)
            optimizer.step()
        return {name: p.detach() for name, p in params.items()}

    return train


class TestTorchOptimisers:
    """``torch.optim`` optimisers, handed to estimators as they are."""

    @every_optimiser
    @parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_unrolled(self, make, tape):
        optimizer = make(clones(on_torch(PARAMS)))
        out = estimate(hg.Unrolled(optimizer, STEPS, tape=tape))
        values_agree(out.state.params, really(make, STEPS))
        slopes_agree(out, slopes(lambda hparams: really(make, STEPS, hparams)))

    @every_optimiser
    def test_greedy(self, make):
        out = estimate(hg.Greedy(make(clones(on_torch(PARAMS)))), STEPS)
        values_agree(out.state.params, really(make, STEPS))
        slopes_agree(out, slopes(after_one_step_from(make, STEPS - 1)))

    @every_optimiser
    def test_the_optimiser_itself_is_left_alone(self, make):
        mine = clones(on_torch(PARAMS))
        optimizer = make(mine)
        mine[0].grad = torch.ones_like(mine[0])
        optimizer.step()

        def held():
            return optree.tree_leaves([mine, [p.grad for p in mine], list(optimizer.state.values())])

        before = [torch.as_tensor(x).clone() for x in held()]
        estimate(hg.Unrolled(optimizer, STEPS))
        assert all(torch.equal(a, torch.as_tensor(b)) for a, b in zip(before, held(), strict=True))

    @every_optimiser
    def test_an_estimate_starts_fresh(self, make):
        mine = clones(on_torch(PARAMS))
        optimizer = make(mine)
        for p in mine:
            p.grad = torch.ones_like(p)
        optimizer.step()
        values_agree(estimate(hg.Unrolled(optimizer, STEPS)).state.params, really(make, STEPS))

    def test_options_are_read_when_used(self):
        optimizer = optim.SGD(clones(on_torch(PARAMS)), 0.5, momentum=0.9)
        estimator = hg.Unrolled(optimizer, STEPS)
        optimizer.param_groups[0]["lr"] = 0.1
        values_agree(estimate(estimator).state.params, really(OPTIMISERS["sgd-momentum"], STEPS))

    def test_a_rate_in_a_tensor(self):
        rate = torch.tensor(0.05, dtype=torch.float64)
        make = partial(optim.Adam, lr=rate, foreach=False)
        out = estimate(hg.Unrolled(make(clones(on_torch(PARAMS))), STEPS))
        values_agree(out.state.params, really(OPTIMISERS["adam"], STEPS))
        slopes_agree(out, slopes(lambda hparams: really(OPTIMISERS["adam"], STEPS, hparams)))

    def test_clipping_before_it(self):
        make = OPTIMISERS["adam-decay"]
        optimizer = make(clones(on_torch(PARAMS)))
        out = estimate(hg.Unrolled(hg.ClipNorm(optimizer, ALWAYS), STEPS))
        values_agree(out.state.params, really(make, STEPS, max_norm=ALWAYS))

    def test_beside_a_rule_of_ones_own(self):
        own = estimate(hg.Unrolled(RULES["adam"][0], STEPS))
        given = estimate(hg.Unrolled(OPTIMISERS["adam"](clones(on_torch(PARAMS))), STEPS))
        slopes_agree(own, given.hypergradient["log_l2"].numpy(), 1e-12)


class TestRules:
    """Update rules of this library, against the optimisers of torch that they name."""

    @every_rule
    def test_unrolled(self, rule, name):
        make = OPTIMISERS[name]
        out = estimate(hg.Unrolled(rule, STEPS))
        values_agree(out.state.params, really(make, STEPS))
        slopes_agree(out, slopes(lambda hparams: really(make, STEPS, hparams)))

    @every_rule
    def test_greedy(self, rule, name):
        out = estimate(hg.Greedy(rule), STEPS)
        values_agree(out.state.params, really(OPTIMISERS[name], STEPS))
        slopes_agree(out, slopes(after_one_step_from(OPTIMISERS[name], STEPS - 1)))

    # Adam's first step is along g/|g|, whose derivative is what rounding leaves of it: greedy starts warm.
    ESTIMATORS = {"greedy": (hg.Greedy, STEPS), "unrolled": (partial(hg.Unrolled, steps=STEPS), 1)}
    every_estimator = parametrize(("estimator", "estimates"), ESTIMATORS.values(), ids=ESTIMATORS)

    @every_rule
    @every_estimator
    def test_numpy_and_torch_agree(self, rule, name, estimator, estimates):
        self.agree(estimator(rule), estimates)

    @every_norm
    @every_estimator
    def test_numpy_and_torch_agree_on_clipping(self, max_norm, estimator, estimates):
        self.agree(estimator(hg.ClipNorm(hg.Adam(0.05), max_norm)), estimates)

    def agree(self, estimator, estimates):
        mine, numpy = (estimate(estimator, estimates, BACKENDS[name]) for name in ("torch", "numpy"))
        values_agree(mine.state.params, on_torch(numpy.state.params))
        slopes_agree(mine, numpy.hypergradient["log_l2"], 1e-12)


class TestClipNorm:
    RULES = {"sgd-nesterov": RULES["sgd-nesterov"], "adam": RULES["adam"], "adagrad": RULES["adagrad"]}
    every_rule = parametrize(("rule", "name"), RULES.values(), ids=RULES)

    @every_rule
    @every_norm
    def test_where_it_is_active(self, rule, name, max_norm):
        norms = []
        really(OPTIMISERS[name], STEPS, max_norm=max_norm, seen=norms)
        clipped = [norm > max_norm for norm in norms]
        assert {ALWAYS: all(clipped), SOMETIMES: 0 < sum(clipped) < STEPS, NEVER: not any(clipped)}[max_norm]

    @every_rule
    @every_norm
    def test_unrolled(self, rule, name, max_norm):
        make = OPTIMISERS[name]
        out = estimate(hg.Unrolled(hg.ClipNorm(rule, max_norm), STEPS))
        values_agree(out.state.params, really(make, STEPS, max_norm=max_norm))
        slopes_agree(out, slopes(lambda hparams: really(make, STEPS, hparams, max_norm=max_norm)))

    @every_rule
    @every_norm
    def test_greedy(self, rule, name, max_norm):
        make = OPTIMISERS[name]
        out = estimate(hg.Greedy(hg.ClipNorm(rule, max_norm)), STEPS)
        values_agree(out.state.params, really(make, STEPS, max_norm=max_norm))
        slopes_agree(out, slopes(after_one_step_from(make, STEPS - 1, max_norm)))

    def test_above_all_norms_it_changes_nothing(self):
        plain, clipped = (
            estimate(hg.Unrolled(rule, STEPS)) for rule in (hg.Adam(0.05), hg.ClipNorm(hg.Adam(0.05), NEVER))
        )
        values_agree(clipped.state.params, plain.state.params, 0.0)
        slopes_agree(clipped, plain.hypergradient["log_l2"].numpy(), 1e-14)

    @parametrize("name", ["numpy", "torch"])
    def test_a_gradient_of_zero(self, name):
        backend = BACKENDS[name]
        zero, lam = backend.asarray(np.zeros(3)), backend.asarray(np.zeros(3))
        losses = hg.Bilevel(lambda p, h, b: backend.xp.sum(h * p), lambda p, h, b: backend.xp.sum(p))
        estimator = hg.Greedy(hg.ClipNorm(hg.SGD(0.1), 1.0))
        out = estimator.estimate(losses, estimator.init(losses, zero, lam), lam, None, None)
        np.testing.assert_allclose(backend.to_numpy(out.hypergradient), -0.1, rtol=1e-12)


class TestRefusals:
    ESTIMATORS = {"greedy": hg.Greedy, "unrolled": partial(hg.Unrolled, steps=2)}
    every_estimator = parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)

    @every_estimator
    @parametrize("kind", [optim.NAdam, optim.LBFGS])
    def test_optimisers_that_are_not_differentiated(self, kind, estimator):
        self.refuses(kind, estimator)

    @every_estimator
    def test_a_subclass_of_ones_own(self, estimator):
        self.refuses(type("Mine", (optim.Adam,), {}), estimator)

    def refuses(self, kind, estimator):
        with pytest.raises(errors.UnsupportedOpError) as caught:
            estimate(estimator(kind(clones(on_torch(PARAMS)))))
        for name in (kind.__name__, "SGD", "Adam", "AdamW", "RMSprop", "Adagrad"):
            assert re.search(rf"\b{name}\b", str(caught.value))
        assert 'response="gradient"' in str(caught.value)

    @every_estimator
    def test_several_groups(self, estimator):
        w, b, v = clones(on_torch(PARAMS))
        optimizer = optim.SGD([{"params": [w], "lr": 0.1}, {"params": [b, v]}], lr=0.01)
        with pytest.raises(errors.ArgumentError, match="ModuleTuner"):
            estimate(estimator(optimizer))

    @parametrize("max_norm", [0, -1.0, float("nan"), True], ids=repr)
    def test_norms_to_clip_at(self, max_norm):
        with pytest.raises(errors.ArgumentError, match="max_norm"):
            hg.ClipNorm(hg.SGD(0.1), max_norm)

    def test_clipping_before_no_rule(self):
        with pytest.raises(errors.ArgumentError, match="update rule"):
            hg.ClipNorm("sgd", 1.0)

    def test_nesterov_with_dampening(self):
        with pytest.raises(errors.ArgumentError, match="dampening"):
            hg.SGD(0.1, momentum=0.9, nesterov=True, dampening=0.1)
