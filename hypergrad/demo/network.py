"""A multilayer perceptron with an L2 strength for each layer and noise at the input, for any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Array, Backend, Scalar, Tree
from hypergrad.demo.data import Split
from hypergrad.problems.bilevel import Bilevel

HIDDEN = 32


def init_params(backend: Backend, data: Split, seed: int) -> Tree:
    """Return two layers with tanh between: random weights of variance 1/inputs, and biases of zero."""
    rng = np.random.default_rng(seed)
    widths = (data.x.shape[1], HIDDEN, data.y.shape[1])
    return [
        {
            "w": backend.asarray(rng.normal(size=(m, n)) / np.sqrt(m)),
            "b": backend.asarray(np.zeros(n)),
        }
        for m, n in zip(widths[:-1], widths[1:], strict=True)
    ]


def init_hparams(backend: Backend, log_l2: float, noise: float) -> Tree:
    """Return the same penalty for each layer, and the standard deviation of the noise at the input."""
    return {"log_l2": backend.asarray(np.full(2, log_l2)), "noise": backend.asarray(np.array(noise))}


def bilevel(backend: Backend) -> Bilevel:
    """Return the problem: cross-entropy, with noise and penalties on T1, and without them on T2."""
    xp = backend.xp

    def cross_entropy(params: Tree, x: Array, y: Array) -> Scalar:
        logits = network(backend, params, x)
        shifted = logits - xp.max(logits, axis=1, keepdims=True)
        return xp.mean(xp.log(xp.sum(xp.exp(shifted), axis=1)) - xp.sum(shifted * y, axis=1))

    def inner(params: Tree, hparams: Tree, batch: Tree) -> Scalar:
        strengths = xp.exp(hparams["log_l2"])
        penalty = sum(strengths[i] * xp.sum(layer["w"] ** 2) for i, layer in enumerate(params))
        noisy = batch["x"] + hparams["noise"] * batch["noise"]
        return cross_entropy(params, noisy, batch["y"]) + penalty

    def outer(params: Tree, hparams: Tree, batch: Tree) -> Scalar:
        return cross_entropy(params, batch["x"], batch["y"])

    return Bilevel(inner, outer)


def network(backend: Backend, params: Tree, x: Array) -> Array:
    """Return the logits, shape (n, classes)."""
    *hidden, last = params
    for layer in hidden:
        x = backend.xp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def minibatches(backend: Backend, data: Split, size: int, seed: int) -> Callable[[Any], Tree]:
    """Return a function t -> batch that draws examples, and noise for each of them, from (seed, t).

    In a compiled program t has no value: there the framework's generator draws other numbers.
    """
    size = min(size, len(data.x))

    def traced(t: Any) -> Tree:
        normal, like = backend.random.normal, whole["x"]
        chosen = normal(2 * seed, t, (len(data.x),), like).argsort()[:size]
        noise = normal(2 * seed + 1, t, (size, data.x.shape[1]), like)
        return {"x": whole["x"][chosen], "y": whole["y"][chosen], "noise": noise}

    if backend.compiles:
        whole = full_batch(backend, data)
        return traced

    def batch(t: Any) -> Tree:
        rng = np.random.default_rng((seed, int(t)))
        chosen = rng.choice(len(data.x), size, replace=False)
        return {
            "x": backend.asarray(data.x[chosen]),
            "y": backend.asarray(data.y[chosen]),
            "noise": backend.asarray(rng.normal(size=(size, data.x.shape[1]))),
        }

    return batch


def full_batch(backend: Backend, data: Split) -> Tree:
    """Return all of a split as one batch without noise."""
    return {"x": backend.asarray(data.x), "y": backend.asarray(data.y)}


def error_rate(backend: Backend, params: Tree, data: Split) -> float:
    """Return the share of examples whose largest logit is not the label's."""
    logits = backend.to_numpy(network(backend, params, backend.asarray(data.x)))
    return float(np.mean(logits.argmax(axis=1) != data.y.argmax(axis=1)))
