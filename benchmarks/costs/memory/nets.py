"""A framework's network, its losses and data; the framework is loaded by the process that measures."""

from collections.abc import Callable
from typing import Any, NamedTuple

import hypergrad as hg
from benchmarks.costs.memory.case import HYPERPARAMETERS, MOMENTUM, RATE
from benchmarks.costs.nets import IN, OUT, layers
from benchmarks.shared.networks import squares

BATCHES = 10


class Net(NamedTuple):
    """A framework's MLP, its losses and data."""

    inner: Callable[..., Any]
    outer: Callable[..., Any]
    gradient: Callable[[Any], Any]
    parameters: Callable[[int], dict[str, Any]]
    hparams: Any
    train: Callable[[Any], Any]
    val: Any

    @property
    def problem(self) -> Any:
        return hg.Bilevel(self.inner, self.outer)

    def step(self, params: dict[str, Any], velocity: dict[str, Any]) -> Any:
        """A training step as one would write it."""
        g = self.gradient(params)
        velocity = {name: MOMENTUM * v + g[name] for name, v in velocity.items()}
        return {name: p - RATE * velocity[name] for name, p in params.items()}, velocity


def torch_net(size: int) -> Net:
    import torch

    from benchmarks.costs.nets import in_torch as suite

    # Memory does not depend on the threads, and two that wait for one core make the clock useless.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = suite.batch_of(BATCHES * size)
    hparams = torch.full((HYPERPARAMETERS,), -6.0)

    def train(t):
        place = int(t) % BATCHES * size
        return x[place : place + size], y[place : place + size]

    def gradient(params):
        variables = {name: p.detach().requires_grad_() for name, p in params.items()}
        found = torch.autograd.grad(suite.with_l2(variables, hparams, train(0)), list(variables.values()))
        return dict(zip(variables, found, strict=True))

    val = suite.batch_of(size)
    return Net(suite.with_l2, suite.outer, gradient, suite.parameters, hparams, train, val)


def jax_net(size: int) -> Net:
    import jax
    from jax import lax

    from benchmarks.costs.nets import in_jax as suite

    data, hparams = suite.batch_of(BATCHES * size, 0), jax.numpy.full(HYPERPARAMETERS, -6.0)
    data = {"x": data["x"], "y": data["y"]}
    val = {name: leaf[:size] for name, leaf in suite.batch_of(size, 1).items() if name in data}

    def train(t):
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, t % BATCHES * size, size), data)

    def gradient(params):
        return jax.grad(suite.with_l2)(params, hparams, train(0))

    return Net(suite.with_l2, suite.outer, gradient, suite.parameters, hparams, train, val)


def numpy_net(size: int) -> Net:
    import autograd
    import autograd.numpy as np

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCHES * size, IN)), np.eye(OUT)[rng.integers(OUT, size=BATCHES * size)]
    hparams = np.full(HYPERPARAMETERS, -6.0)

    def parameters(width):
        return layers(width, lambda k, m, n: rng.normal(size=(m, n)), np.zeros)

    def train(t):
        place = int(t) % BATCHES * size
        return x[place : place + size], y[place : place + size]

    def outer(params, hparams, batch):
        z, labels = batch
        for k in range(4):
            z = np.dot(z, params[f"w{k}"]) + params[f"b{k}"]
            z = np.maximum(z, 0.0) if k < 3 else z
        high = np.max(z, axis=1, keepdims=True)
        logs = z - high - np.log(np.sum(np.exp(z - high), axis=1, keepdims=True))
        return -np.mean(np.sum(labels * logs, axis=1))

    def inner(params, hparams, batch):
        return outer(params, hparams, batch) + squares(np, params, hparams)

    slope = autograd.grad(inner)
    return Net(
        inner, outer, lambda params: slope(params, hparams, train(0)), parameters, hparams, train, train(1)
    )


NETS = {"torch": torch_net, "jax": jax_net, "numpy": numpy_net}
