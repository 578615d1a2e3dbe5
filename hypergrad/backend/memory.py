"""Where arrays lie: on the host or on a device, whole or in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypergrad.backend.types import Array, Tree

BLOCK, BLOCKS = 2**15, 64
"""Elements that are enough for a block, and blocks that are enough for an array."""


class Memory:
    """The way to the host's memory and back, and work in blocks. By default everything lies on the host."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend  # a Backend, which is made of this

    def to_host(self, tree: Tree) -> Tree:
        """A copy in the host's memory, made while the device goes on; the tree itself if it lies there."""
        return tree

    def from_host(self, tree: Tree) -> Tree:
        """The way back, for what `to_host` returned."""
        return tree

    def in_blocks(
        self, f: Callable[..., tuple[Sequence[Array], Any]], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        """``f(*used, *given)`` of arrays of one shape, with little memory for intermediate results.

        f works element by element. It returns new values, in the dtypes of those that are ``used`` up and may
        be written over, and a tuple of sums; where it is done in parts, those of all are added. By default it
        is done at once, since not all arrays can be written to.
        """
        new, sums = f(*used, *given)
        return list(new), sums


def blocks(shape: Sequence[int], block: int = BLOCK) -> int:
    """Into how many blocks of rows an array is cut."""
    return max(1, min(BLOCKS, int(np.prod(shape)) // block, shape[0] if len(shape) else 1))


def written_in_blocks(
    f: Callable[..., tuple[Sequence[Array], Any]],
    used: Sequence[Array],
    given: Sequence[Array],
    block: int = BLOCK,
) -> tuple[list[Array], Any]:
    """`Memory.in_blocks` where arrays can be written to: in place, so that intermediate results are
    blocks.
    """
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
