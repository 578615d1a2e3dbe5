"""Where a number stopped being finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.backend.protocol import Backend, Tree


def first_nonfinite(backend: Backend, tree: Tree) -> Any:
    """The number of the first leaf that holds a NaN or an infinity, −1 if all are finite.

    A finite sum shows that all is well with a leaf, at the price of one look; if it is not, it may have
    overflowed.
    """
    xp, leaves = backend.xp, backend.flatten(tree)[0]
    if leaves and backend.readable(*leaves):
        if np.isfinite(sum(float(backend.to_numpy(xp.sum(leaf))) for leaf in leaves)):
            return -1
    return search_nonfinite(backend, tree)


def search_nonfinite(backend: Backend, tree: Tree) -> Any:
    """The same without a look.

    A leaf whose sum overflows counts as one with an infinity, except in half precision, where that is soon
    done: 0 · x is 0 where x is finite and NaN elsewhere, but XLA makes a pass of its own for it.
    """
    xp, found = backend.xp, -1
    for i, leaf in reversed(list(enumerate(backend.flatten(tree)[0]))):
        leaf = leaf if backend.describe(leaf).itemsize >= 4 else 0.0 * leaf
        found = xp.where(xp.isfinite(xp.sum(leaf)), found, i)
    return found
