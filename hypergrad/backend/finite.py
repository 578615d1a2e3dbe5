"""Search trees for numbers that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.backend.protocol import Backend
from hypergrad.backend.types import Tree


def first_nonfinite(backend: Backend, tree: Tree) -> Any:
    """Return the index of the first leaf that holds a NaN or an infinity, or −1 if all leaves are finite.

    If ‖tree‖² is finite, so are all leaves; this costs one pass and one read. If it is not, it may have
    overflowed, so then `search_nonfinite` decides.
    """
    leaves = backend.flatten(tree)[0]
    if leaves and backend.readable(*leaves):
        with np.errstate(over="ignore"):
            square = backend.to_numpy(backend.inner(tree, tree))
        if np.isfinite(square):
            return -1
    return search_nonfinite(backend, tree)


def search_nonfinite(backend: Backend, tree: Tree) -> Any:
    """Like `first_nonfinite`, but never reads a value, so that it can be traced.

    A leaf whose sum overflows counts as infinite. Half precision overflows early, so there the sum is of
    0 · x, which is 0 where x is finite and NaN elsewhere. XLA needs a separate pass for that.
    """
    xp, first = backend.xp, -1
    for i, leaf in reversed(list(enumerate(backend.flatten(tree)[0]))):
        leaf = leaf if backend.describe(leaf).itemsize >= 4 else 0.0 * leaf
        first = xp.where(xp.isfinite(xp.sum(leaf)), first, i)
    return first
