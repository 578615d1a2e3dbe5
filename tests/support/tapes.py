"""A small net trained with every tape; the witness is `Full`.

It has weights for the examples, penalties for the layers, and a rate for each step.
"""

from functools import cache

import numpy as np
import pytest

import hypergrad as hg
from support import runs
from support.frameworks import BACKENDS, dear
from support.runs import EXACT, Given, estimate, inertia, rate

parametrize = pytest.mark.parametrize
T, ROWS = 12, 6
REVERSED = 1e-9
TAPES = {
    "states": hg.States(),
    "binomial-1": hg.Binomial(slots=1),
    "binomial-2": hg.Binomial(slots=2),
    "binomial-4": hg.Binomial(slots=4),
    "binomial-20": hg.Binomial(slots=20),
    "reversible": hg.Reversible(),
    "offload-states": hg.Offload(hg.States()),
    "offload-binomial": hg.Offload(hg.Binomial(slots=3)),
}
VERIFIED = {
    "states": hg.States(verify=True),
    "binomial-1": hg.Binomial(slots=1, verify=True),
    "binomial-3": hg.Binomial(slots=3, verify=True),
    "offload-states": hg.Offload(hg.States(verify=True)),
    "offload-binomial": hg.Offload(hg.Binomial(slots=3, verify=True)),
}
RESTARTING = [tape for name, tape in TAPES.items() if name != "reversible"]  # they hold what was, as it was
AFFORDABLE = [hg.Binomial(slots=2), hg.Reversible()]
MORE = ["binomial-4", "binomial-20"]
each_tape = parametrize("tape", [dear(t) if name in MORE else t for name, t in TAPES.items()], ids=TAPES)
each_verified = parametrize("tape", VERIFIED.values(), ids=VERIFIED)
few_tapes = parametrize("tape", [t if t in AFFORDABLE else dear(t) for t in TAPES.values()], ids=TAPES)
few_restarting = parametrize("tape", [t if t in AFFORDABLE else dear(t) for t in RESTARTING], ids=repr)
HEAVY = hg.SGD(rate, momentum=inertia, weight_decay=0.01)
RULES = {"sgd": HEAVY, "adam": hg.Adam(rate, beta1=inertia, eps=0.1)}
STEADY = hg.SGD(lambda h: h["lr"][0], momentum=lambda h: h["momentum"][0])


def start(hparams):
    """θ_0 as a function of the hyperparameters, as in MAML; λ takes it in other coordinates."""
    return {"w": 1.0 * hparams["start"]["w"], "v": hparams["start"]["v"] ** 3}


def losses(xp):
    def residual(params, batch):
        return xp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]

    def inner(params, hparams, batch):
        strengths = xp.exp(hparams["log_l2"])
        penalty = strengths[0] * xp.sum(params["w"] ** 2) + strengths[1] * xp.sum(params["v"] ** 2)
        return xp.mean(hparams["weights"] * residual(params, batch) ** 2) + penalty

    return hg.Bilevel(inner, lambda params, hparams, batch: xp.mean(residual(params, batch) ** 2))


def drawn(steps=T, seed=0):
    """θ, λ, four batches of T1 and one of T2, in NumPy."""
    rng = np.random.default_rng(seed)
    theta = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=4)}
    x, y = rng.normal(size=(5, ROWS, 3)), rng.normal(size=(5, ROWS))
    lam = {
        "lr": rng.uniform(0.03, 0.1, steps),
        "momentum": rng.uniform(0.3, 0.9, steps),
        "log_l2": rng.uniform(-3.0, -2.0, 2),
        "weights": rng.uniform(0.5, 1.5, ROWS),
        "start": {"w": theta["w"], "v": np.cbrt(theta["v"])},
    }
    return theta, lam, {"x": x[:4], "y": y[:4]}, {"x": x[4], "y": y[4]}


def net(backend, steps=T, seed=0, with_start=True):
    theta, lam, data, val = backend.map(backend.asarray, drawn(steps, seed))
    if not with_start:
        del lam["start"]
    return Given(losses(backend.xp), theta, lam, lambda t: backend.map(lambda leaf: leaf[t % 4], data), val)


def same(backend, mine, other, tape):
    """Two estimates of one run, as exactly as the tape of the first allows."""
    runs.same(backend, mine, other, REVERSED if isinstance(tape, hg.Reversible) else EXACT)


def numpy_tree(backend, tree):
    return backend.map(backend.to_numpy, tree)


@cache
def full(name, rule, truncate=None, with_start=True):
    """The witness of a framework, compiled once."""
    begin = start if with_start else None
    unrolled = hg.Unrolled(RULES[rule], T, truncate, start=begin, allow_unused=True)
    return estimate(BACKENDS[name], net(BACKENDS[name], with_start=with_start), unrolled)


def ending(p, steps):
    """A function of batches that stops."""

    def train(t):
        if t >= steps:
            raise StopIteration
        return p.train(t)

    return train
