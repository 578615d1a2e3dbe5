"""A small net trained in forward mode; the witness is `Unrolled`."""

from functools import cache, partial

import numpy as np
import optree

import hypergrad as hg
from support import frameworks
from support.frameworks import BACKENDS
from support.runs import Given, estimate, inertia, rate

T, ROWS = 10, 6
HEAVY = hg.SGD(rate, momentum=inertia)
RULES = {
    "sgd": HEAVY,
    "adam": hg.Adam(rate, beta1=inertia, eps=0.1, weight_decay=lambda h: h["gain"]),
    "rmsprop": hg.RMSprop(rate, momentum=inertia, eps=0.1),
}


def start(hparams):
    """θ_0 as a function of the hyperparameters."""
    return {"w": hparams["gain"] * hparams["start"], "v": hparams["start"][0] ** 3}


def net(backend, shifts=(0.0,) * (T + 1), dtype=float):
    """A small net with weights for the examples, a gain to learn, and a rate for each step.

    ``shifts`` move the penalty of each step, and in the end that of the judgement.
    """
    xp, rng = backend.xp, np.random.default_rng(0)

    def strength(hparams, batch):
        return xp.exp(hparams["log_l2"] + batch["shift"])

    def residual(params, hparams, batch):
        return xp.tanh(hparams["gain"] * batch["x"] @ params["w"]) @ params["v"] - batch["y"]

    def inner(params, hparams, batch):
        squares = hparams["weights"] * residual(params, hparams, batch) ** 2
        return xp.mean(squares) + strength(hparams, batch) * xp.sum(params["w"] ** 2)

    def outer(params, hparams, batch):
        return xp.mean(residual(params, hparams, batch) ** 2) + 0.1 * strength(hparams, batch)

    x, y = rng.normal(size=(T + 1, ROWS, 2)), rng.normal(size=(T + 1, ROWS))
    data = {"x": x, "y": y, "shift": np.array(shifts)}
    theta = {"w": rng.normal(size=(2, 3)), "v": rng.normal(size=3)}
    lam = {
        "lr": rng.uniform(0.03, 0.1, T),
        "momentum": rng.uniform(0.3, 0.9, T),
        "log_l2": np.array(-2.5),
        "gain": np.array(0.8),
        "weights": rng.uniform(0.5, 1.5, ROWS),
        "start": rng.normal(size=(2, 3)),
    }
    cast = lambda leaf: backend.asarray(leaf.astype(dtype))  # noqa: E731
    theta, lam, data = optree.tree_map(cast, (theta, lam, data))
    train = lambda t: backend.map(lambda leaf: leaf[t], data)  # noqa: E731
    return Given(hg.Bilevel(inner, outer), theta, lam, train, train(T))


def flat(backend, tree):
    return np.concatenate([np.ravel(backend.to_numpy(leaf)) for leaf in backend.flatten(tree)[0]])


fit = partial(hg.Forward, allow_unused=True)  # λ holds a start, which not every run uses


def program(backend, p, estimator):
    """Estimates from a state, one program for all of them."""
    of = lambda state, hparams: estimator.estimate(p.problem, state, hparams, p.train, p.val)  # noqa: E731
    return frameworks.program(backend, of)


@cache
def full(name, rule="sgd", steps=T, with_start=False):
    """What the way back gives, compiled once."""
    begin = start if with_start else None
    unrolled = hg.Unrolled(RULES[rule], steps, start=begin, allow_unused=True)
    return estimate(BACKENDS[name], net(BACKENDS[name]), unrolled)


SIZE = 2 * T + 2 + ROWS + 6  # hyperparameters
STEADY = hg.SGD(0.1, momentum=0.5)
