"""A dense network and its losses, in the elementwise functions that every backend has."""

from __future__ import annotations

from typing import Any

import numpy as np


def weights(rng: np.random.Generator, *widths: int, copies: int | None = None) -> list[dict[str, np.ndarray]]:
    """Layers with weights of variance 1/inputs, and biases zero; several copies have an axis of their own."""
    matrix, row = ((), ()) if copies is None else ((copies,), (copies, 1))
    return [
        {"w": rng.normal(size=(*matrix, m, n)) / np.sqrt(m), "b": np.zeros((*row, n))}
        for m, n in zip(widths[:-1], widths[1:], strict=True)
    ]


def dense(layer: dict[str, Any], x: Any) -> Any:
    return x @ layer["w"] + layer["b"]


def tanh_network(xp: Any, params: Any, x: Any) -> Any:
    """Dense layers with tanh between; a leading axis is one of copies."""
    *hidden, last = params
    for layer in hidden:
        x = xp.tanh(dense(layer, x))
    return dense(last, x)


def cross_entropies(xp: Any, logits: Any, y: Any) -> Any:
    """Of each example, for one-hot labels."""
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return xp.log(xp.sum(xp.exp(shifted), axis=-1)) - xp.sum(shifted * y, axis=-1)


def squares(xp: Any, params: dict[str, Any], log_l2: Any) -> Any:
    """Σ_k exp(log_l2[k]) Σ w_k², of parameters by name: a strength for each layer."""
    strengths = xp.exp(log_l2)
    return sum(strengths[k] * xp.sum(params[f"w{k}"] ** 2) for k in range(len(strengths)))
