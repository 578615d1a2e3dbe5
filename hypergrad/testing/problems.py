"""Small problems, written in a backend's own operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.problems.bilevel import Bilevel


def close(backend: Backend, mine: Tree, other: Tree, rtol: float = 1e-10) -> None:
    """Assert that two trees of arrays are equal up to rounding."""
    left, right = backend.flatten(mine)[0], backend.flatten(other)[0]
    assert len(left) == len(right), f"{len(left)} leaves against {len(right)}"
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(backend.to_numpy(a), backend.to_numpy(b), rtol=rtol, atol=rtol)


def vector(backend: Backend, seed: int, *shape: int, dtype: Any = float) -> Any:
    """Return a random array."""
    return backend.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def tree(backend: Backend, seed: int, dtype: Any = float) -> Tree:
    """Return a random tree with nested containers, a 0-d leaf, an empty leaf and a ``None``."""
    return {
        "w": vector(backend, seed, 3, 2, dtype=dtype),
        "rest": [vector(backend, seed + 1, 2, dtype=dtype), (vector(backend, seed + 2, dtype=dtype), None)],
        "empty": vector(backend, seed + 3, 0, dtype=dtype),
    }


def smooth(backend: Backend, x: Tree) -> Scalar:
    """Evaluate a scalar function of such a tree, whose second derivatives couple the leaves."""
    xp = backend.xp
    hidden = xp.tanh(x["w"] @ x["rest"][0] + x["rest"][1][0])
    return xp.sum(hidden * hidden * xp.exp(hidden)) + xp.sum(x["empty"])


def regression(backend: Backend, dtype: Any = float) -> tuple[Bilevel, Tree, Tree, Tree, Tree]:
    """Return a regression by a small tanh net, with a penalty for each layer: problem, θ, λ, T1 and T2 batch.

    The penalties are strong enough to make it convex at θ, as some solvers need it.
    """
    xp = backend.xp

    def predict(params: Tree, x: Any) -> Any:
        return xp.tanh(x @ params["w"]) @ params["v"]

    def outer(params: Tree, hparams: Tree, batch: Tree) -> Scalar:
        residual = predict(params, batch["x"]) - batch["y"]
        return xp.mean(residual * residual)

    def inner(params: Tree, hparams: Tree, batch: Tree) -> Scalar:
        strengths = xp.exp(hparams["log_l2"])
        penalty = strengths[0] * xp.sum(params["w"] ** 2) + strengths[1] * xp.sum(params["v"] ** 2)
        return outer(params, hparams, batch) + penalty + hparams["tilt"] * xp.sum(params["v"])

    params = {"w": vector(backend, 1, 3, 2, dtype=dtype), "v": vector(backend, 2, 2, dtype=dtype)}
    hparams = {
        "log_l2": backend.asarray(np.array([1.0, 1.5], dtype)),
        "tilt": backend.asarray(np.array(0.3, dtype)),
    }
    train, val = (
        {"x": vector(backend, s, 8, 3, dtype=dtype), "y": vector(backend, s + 1, 8, dtype=dtype)}
        for s in (3, 5)
    )
    return Bilevel(inner, outer), params, hparams, train, val
