"""Central differences in NumPy, the witness of laws that is not a derivative of a framework."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hypergrad.backend import Backend, Tree


def along(backend: Backend, tree: Tree, direction: Tree, distance: float) -> Tree:
    """Return x + h d, in NumPy and back."""
    return backend.map(
        lambda x, d: backend.asarray(backend.to_numpy(x) + distance * backend.to_numpy(d), like=x),
        tree,
        direction,
    )


def directional(f: Callable[[float], float], h: float = 1e-3) -> float:
    """Return f'(0) by five points, with an error of order h⁴."""
    return (f(-2 * h) - 8 * f(-h) + 8 * f(h) - f(2 * h)) / (12 * h)


def random_like(backend: Backend, tree: Tree, seed: int) -> Tree:
    """Return standard normal numbers in the form of a tree; integers become zeros."""
    rng = np.random.default_rng(seed)

    def leaf(x: object) -> object:
        values = backend.to_numpy(x)
        drawn = rng.normal(size=values.shape)
        return backend.asarray(
            (drawn if values.dtype.kind == "f" else 0 * drawn).astype(values.dtype), like=x
        )

    return backend.map(leaf, tree)


def dot(backend: Backend, x: Tree, y: Tree) -> float:
    """Return ⟨x, y⟩, summed in NumPy."""
    pairs = zip(backend.flatten(x)[0], backend.flatten(y)[0], strict=True)
    return sum(float(np.sum(backend.to_numpy(a) * backend.to_numpy(b))) for a, b in pairs)
