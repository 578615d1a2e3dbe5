"""Where a number stopped being finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.backend.protocol import Backend
from hypergrad.backend.types import Tree


def first_nonfinite(backend: Backend, tree: Tree) -> Any:
    """The position of the first leaf, counted from 0, that holds a NaN or an infinity; −1 if all are finite.

    A finite sum shows that a leaf is finite, and costs one pass over it. A sum that is not finite may have
    overflowed, so that `search_nonfinite` decides.
    """
    leaves = backend.flatten(tree)[0]
    if leaves and backend.readable(*leaves):
        if np.isfinite(sum(map(float, map(backend.to_numpy, map(backend.xp.sum, leaves))))):
            return -1
    return search_nonfinite(backend, tree)


def search_nonfinite(backend: Backend, tree: Tree) -> Any:
    """Like `first_nonfinite`, but never reads a value, so that it can be traced.

    A leaf whose sum overflows counts as one with an infinity. Half precision overflows soon, so there 0 · x
    is summed, which is 0 where x is finite and NaN elsewhere; XLA makes a pass of its own for it.
    """
    xp, first = backend.xp, -1
    for i, leaf in reversed(list(enumerate(backend.flatten(tree)[0]))):
        leaf = leaf if backend.describe(leaf).itemsize >= 4 else 0.0 * leaf
        first = xp.where(xp.isfinite(xp.sum(leaf)), first, i)
    return first
