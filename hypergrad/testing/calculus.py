"""Derivatives under their usual names, for laws and tests. No estimator needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree


def value_and_grad(backend: Backend, f: Callable[[Tree], Scalar], x: Tree) -> tuple[Scalar, Tree]:
    """Return value and gradient of a scalar function of one tree."""
    value, pullback = backend.pullback(f, x)
    (gradient,) = pullback(backend.xp.ones_like(value))
    return value, gradient


def jvp(
    backend: Backend, f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """Return ``(f(*primals), ∂f · tangents)``."""
    value, push, _ = backend.linearize(lambda *xs: (f(*xs), None), *primals)
    return value, push(*tangents)


def check_slope(backend: Backend, name: str, call: Callable[..., Tree], *at: Any) -> None:
    """Compare the derivative of ``call(xp, *arrays)`` with a central difference of ``call(numpy, *at)``.

    Raises:
        AssertionError: if they differ; the message has the name.
    """
    directions = np.random.default_rng(0).normal(size=(len(at), *at[0].shape))
    value, pullback = backend.pullback(
        lambda *arrays: backend.flatten(call(backend.xp, *arrays))[0], *map(backend.asarray, at)
    )
    weights = [np.cos(np.arange(1.0, x.size + 1)).reshape(x.shape) for x in map(backend.to_numpy, value)]
    gradients = pullback([backend.asarray(w) for w in weights])
    slope = sum(np.sum(backend.to_numpy(g) * d) for g, d in zip(gradients, directions, strict=True))

    def along(s: float) -> Any:
        values = backend.flatten(call(np, *(x + s * d for x, d in zip(at, directions, strict=True))))[0]
        return sum(np.sum(w * y) for w, y in zip(weights, values, strict=True))

    h = 1e-6
    expected = (along(h) - along(-h)) / (2 * h)
    np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-14, err_msg=f"the slope of {name}")
