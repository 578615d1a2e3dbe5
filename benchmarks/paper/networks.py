"""The paper's networks and its two losses, written once for JAX and torch.

    C̃1 = cross-entropy on T1 with noise + Σ_l λ_l Σ W_l²      (no ½, no biases, the softmax layer included)
    C2 = cross-entropy on T2, without noise and penalties

Additive Gaussian noise stands at the input of each layer but the softmax: ``input_noise``, and
``hidden_noise`` for the layers after it. Batch normalisation has its scale fixed at 1 and a learned shift;
T1 is normalised by the batch's own statistics, T2 and test by running averages of T1's. A hyperparameter
that is a vector has an entry for each layer, and one that is a scalar is tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import hypergrad as hg
from benchmarks.shared.networks import cross_entropies

DECAY, EPS = 0.9, 1e-5


@dataclass(frozen=True)
class Net:
    """A multilayer perceptron; ``layers`` are its hidden widths."""

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    batch_norm: bool
    classes: int = 10
    slope: float = 0.0
    """Of the rectifier below zero."""

    def shapes(self) -> list[tuple[int, ...]]:
        widths = (int(np.prod(self.inputs)), *self.layers, self.classes)
        return list(zip(widths[:-1], widths[1:], strict=True))

    def input(self, xp: Any, x: Any) -> Any:
        return x

    def layer(self, ops: Any, k: int, x: Any, w: Any) -> Any:
        return x @ w

    def head(self, xp: Any, x: Any) -> Any:
        return x

    def normed(self, k: int) -> bool:
        return self.batch_norm and k < len(self.shapes()) - 1

    def start(self, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Weights of variance 2 / inputs, biases zero; and the running averages."""
        rng, params, aux = np.random.default_rng((seed, 1)), [], []
        for k, shape in enumerate(self.shapes()):
            w = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
            n = shape[-1]
            params.append({"w": w.astype(np.float32), "b": np.zeros(n, np.float32)})
            if self.normed(k):
                aux.append({"mean": np.zeros(n, np.float32), "var": np.ones(n, np.float32)})
        return params, aux

    def logits(
        self, ops: Any, params: Any, x: Any, aux: Any, noise: Any = None, draw: Any = None, own: bool = False
    ) -> Any:
        """Logits and new running averages; training is what has a ``draw`` of noise.

        The batch's ``own`` statistics normalise it in training, and elsewhere if that is asked for.
        """
        xp, after = ops.xp, []
        x = self.input(xp, x)
        for k, layer in enumerate(params):
            last = k == len(params) - 1
            if draw is not None and noise is not None and not last and noise[k] is not None:
                x = x + noise[k] * ops.normal(draw, k, x.shape)
            x = self.layer(ops, k, x, layer["w"])
            if self.normed(k):
                axes, seen = tuple(range(x.ndim - 1)), aux[k]
                mean, var = seen["mean"], seen["var"]
                if draw is not None or own:
                    mean, var = xp.mean(x, axis=axes), ops.var(x, axes)
                if draw is not None:
                    fresh = {"mean": ops.detach(mean), "var": ops.detach(var)}
                    after.append({name: DECAY * seen[name] + (1 - DECAY) * fresh[name] for name in seen})
                x = (x - mean) / xp.sqrt(var + EPS)
            x = x + layer["b"]
            if not last:
                x = xp.maximum(x, self.slope * x)
        return self.head(xp, x), after if draw is not None else aux

    def noise(self, hparams: dict[str, Any]) -> list[Any]:
        """Its standard deviation at each layer, None where there is none."""
        levels = [hparams.get("input_noise")] + [None] * (len(self.shapes()) - 1)
        if (hidden := hparams.get("hidden_noise")) is not None:
            for k in range(1, len(levels) - 1):
                levels[k] = hidden if hidden.ndim == 0 else hidden[k - 1]
        return levels

    def bilevel(self, ops: Any, own: bool = False) -> hg.Bilevel:
        """The two losses; C2 with T1's running averages, or with its batch's ``own`` statistics."""
        xp = ops.xp

        def cross_entropy(logits: Any, y: Any) -> Any:
            return xp.mean(cross_entropies(xp, logits, y))

        def inner(params: Any, hparams: Any, batch: Any, aux: Any) -> Any:
            x, y, draw = batch
            logits, aux = self.logits(ops, params, x, aux, self.noise(hparams), draw)
            loss = cross_entropy(logits, y)
            if (l2 := hparams.get("l2")) is not None:
                for k, layer in enumerate(params):
                    loss = loss + (l2 if l2.ndim == 0 else l2[k]) * xp.sum(layer["w"] ** 2)
            return loss, aux

        def outer(params: Any, hparams: Any, batch: Any, aux: Any) -> Any:
            x, y = batch
            return cross_entropy(self.logits(ops, params, x, aux, own=own)[0], y)

        return hg.Bilevel(inner, outer, has_aux=True)


@dataclass(frozen=True)
class AllConvolutional(Net):
    """All-CNN-C as the paper changed it: two pooled blocks of three 3×3, then 3×3, 1×1, 1×1, average.

    ``layers`` are the channels of the first block and of the rest: (96, 192).
    """

    slope: float = 0.1

    def shapes(self) -> list[tuple[int, ...]]:
        a, b = self.layers
        channels = (self.inputs[-1], a, a, a, b, b, b, b, b, self.classes)
        sizes = (3,) * 7 + (1, 1)
        return [(s, s, m, n) for s, m, n in zip(sizes, channels[:-1], channels[1:], strict=True)]

    def input(self, xp: Any, x: Any) -> Any:
        return xp.reshape(x, (-1, *self.inputs))

    def layer(self, ops: Any, k: int, x: Any, w: Any) -> Any:
        if k in (3, 6):  # after each block
            x = ops.pooled(x)
        return ops.convolved(x, w)

    def head(self, xp: Any, x: Any) -> Any:
        return xp.mean(x, axis=(1, 2))
