"""The network and its losses in JAX, and what is counted of a compiled program."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from benchmarks.costs.nets import IN, LAYERS, OUT, layers
from benchmarks.shared.networks import squares


def versions() -> dict[str, Any]:
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


@dataclass(frozen=True)
class Compiled:
    """A program with its arguments. XLA counts a loop's body once; ``count`` makes all rounds of that."""

    f: Callable[..., Any]
    args: tuple[Any, ...]
    count: Callable[[float], float] = field(default=lambda once: once)

    @cached_property
    def program(self) -> Any:
        return jax.jit(self.f).lower(*self.args).compile()

    def __call__(self) -> Any:
        return self.program(*self.args)

    @property
    def flops(self) -> float:
        return self.count(self.program.cost_analysis()["flops"])

    @property
    def memory(self) -> int:
        """Bytes of temporary memory."""
        return self.program.memory_analysis().temp_size_in_bytes


def flops(program: Any) -> float:
    return program.flops


def wait(result: Any) -> None:
    jax.block_until_ready(result)


def parameters(width: int) -> dict[str, Any]:
    keys = random.split(random.key(0), LAYERS)
    return layers(width, lambda k, m, n: random.normal(keys[k], (m, n)), jnp.zeros)


def logits(params, x, noise=None, key=None):
    for k in range(4):
        if noise is not None:
            x = x + noise[k] * random.normal(random.fold_in(key, k), x.shape)
        x = x @ params[f"w{k}"] + params[f"b{k}"]
        x = jax.nn.relu(x) if k < 3 else x
    return x


def cross_entropy(outputs, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1))


def outer(params, hparams, batch):
    return cross_entropy(logits(params, batch["x"]), batch["y"])


def with_l2(params, hparams, batch):
    """One strength for each layer."""
    return outer(params, hparams, batch) + squares(jnp, params, hparams)


def with_noise(params, hparams, batch):
    """Gaussian noise at the input of each layer, one level for each; its key comes with the batch."""
    return cross_entropy(logits(params, batch["x"], hparams, batch["key"]), batch["y"])


def with_many(params, hparams, batch):
    """A strength for all weights of the second layer, for each of its rows, or for each weight."""
    return outer(params, hparams, batch) + jnp.sum(jnp.exp(hparams) * params["w1"] ** 2)


def batch_of(size, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, IN)), jnp.float32)
    return {"x": x, "y": jnp.asarray(rng.integers(OUT, size=size)), "key": random.key(seed)}
