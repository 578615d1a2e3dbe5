"""Memory of the host and of devices: copies between them, and elementwise work in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypergrad.backend.types import Array, Tree

BLOCK, BLOCKS = 2**15, 64
"""The minimum number of elements of a block, and the maximum number of blocks of an array."""


class Memory:
    """Copies to the host's memory and back, and work in blocks. By default arrays are on the host."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend  # the `Backend` that this object is part of

    def to_host(self, tree: Tree) -> Tree:
        """Return a copy in host memory, made while the device computes; the tree itself if it is there."""
        return tree

    def from_host(self, tree: Tree) -> Tree:
        """Return a copy on the device of what `to_host` returned."""
        return tree

    def in_blocks(
        self, f: Callable[..., tuple[Sequence[Array], Any]], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        """Evaluate ``new, sums = f(*used, *given)`` on arrays of one shape, with little memory for
        intermediate results.

        f works element by element. It returns new values for the arrays ``used``, in their dtypes, and a
        tuple of sums. The arrays ``used`` may be overwritten. If f runs block by block, the sums of all
        blocks are added. By default it runs once, since not every framework can write to its arrays.
        """
        new, sums = f(*used, *given)
        return list(new), sums


def blocks(shape: Sequence[int], block: int = BLOCK) -> int:
    """Return the number of blocks of rows into which an array of this shape is divided."""
    return max(1, min(BLOCKS, int(np.prod(shape)) // block, shape[0] if len(shape) else 1))


def written_in_blocks(
    f: Callable[..., tuple[Sequence[Array], Any]],
    used: Sequence[Array],
    given: Sequence[Array],
    block: int = BLOCK,
) -> tuple[list[Array], Any]:
    """Implement `Memory.in_blocks` for arrays that can be written to: block by block, in place."""
    arrays = [*used, *given]
    shape = tuple(arrays[0].shape)
    if (count := blocks(shape, block)) == 1:
        new, sums = f(*arrays)
        return list(new), sums
    rows, totals = -(-shape[0] // count), None
    for first in range(0, shape[0], rows):
        part = slice(first, first + rows)
        new, sums = f(*(x[part] for x in arrays))
        for x, value in zip(used, new, strict=True):
            x[part] = value
        totals = sums if totals is None else tuple(a + b for a, b in zip(totals, sums, strict=True))
    return list(used), totals
