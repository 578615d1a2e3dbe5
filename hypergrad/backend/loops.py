"""Control flow: loops and branches that a framework may compile, by default in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypergrad.backend.types import Tree


class Loops:
    """Loops, branches, compilation, and the rows that loops produce. By default nothing is compiled.

    *Rows* are a sequence of trees of one structure, stored in the framework's own way: here a list; where
    loops are compiled, one tree whose leaves have one more axis. `scan`, `each`, `stack` and `empty_rows`
    make rows; `take`, `set_row`, `dense` and `collect` read and write them.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend  # the `Backend` that this object is part of

    def scan(
        self,
        body: Callable[[Tree, Any, Any], tuple[Tree, Any]],
        carry: Tree,
        length: int,
        xs: Any = None,
        reverse: bool = False,
    ) -> tuple[Tree, Any]:
        """Run ``carry, y = body(carry, k, x)`` for k = 0 … length − 1 and return ``carry, ys``.

        ``ys`` are rows, in the order of k. ``xs`` are rows, such as the ys of another scan, of which the body
        gets the k-th as x. With ``reverse``, k counts down.
        """
        ys: list[Any] = [None] * length
        # Hold no reference to the carry during the call, so that the body can free what it no longer needs.
        held = [carry]
        del carry
        for k in reversed(range(length)) if reverse else range(length):
            after, ys[k] = body(held.pop(), k, None if xs is None else xs[k])
            held.append(after)
            del after
        return held.pop(), ys

    def while_loop(
        self, going: Callable[[Tree], Any], body: Callable[[Tree], Tree], carry: Tree, limit: int
    ) -> Tree:
        """Run ``carry = body(carry)`` while ``going(carry)`` and return the last carry.

        ``going`` must be false after ``limit`` iterations at the latest.
        """
        for _ in range(limit):
            if not going(carry):
                break
            carry = body(carry)
        return carry

    def repeat(
        self, body: Callable[[Tree, Any], tuple[Tree, Tree, Tree, Any]], carry: Tree, limit: int
    ) -> tuple[Tree, Any, Tree, Any]:
        """Run ``carry, row, last, going = body(carry, k)`` for k = 0, 1, … until going is false.

        Run at most ``limit`` ≥ 1 iterations. Return ``carry, rows, last, count``: the last carry, the row of
        every iteration, ``last`` of the last iteration, and the number of iterations.
        """
        rows, last = [], None
        for k in range(limit):
            carry, row, last, going = body(carry, k)
            rows.append(row)
            if not going:
                break
        return carry, rows, last, len(rows)

    def cond(self, pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
        """Return ``yes()`` if ``pred`` is true, and ``no()`` if it is false.

        Both return trees of one structure. Where ``no`` returns ``None`` in place of a subtree, a compiled
        program has zeros there, NaN for floats.
        """
        return yes() if pred else no()

    def each(self, f: Callable[..., Tree], *items: Any) -> Any:
        """Return the rows f(x, …) for each x, … of the given rows, vectorised if the framework can do so."""
        return [f(*row) for row in zip(*items, strict=True)]

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as one compiled program, or itself if the framework has no compiler."""
        return f

    def callback(self, listener: Callable[..., None], *values: Any) -> None:
        """Call the listener with the values once they have been computed; it must return ``None``."""
        listener(*values)

    def stack(self, items: Sequence[Tree]) -> Any:
        """Make rows of a sequence of trees of one structure."""
        return items

    def take(self, items: Any, k: Any) -> Tree:
        """Return the k-th row. k may be the integer that a `scan` passes to its body."""
        return items[k]

    def empty_rows(self, like: Tree, count: int) -> Any:
        """Return ``count`` rows for trees like this one; `set_row` sets their values."""
        return [None] * count

    def set_row(self, items: Any, k: Any, item: Tree) -> Any:
        """Return the rows with the k-th replaced. The given rows may be overwritten: use the result."""
        items[k] = item
        return items

    def dense(self, rows: Any) -> Tree:
        """Return rows as one tree of the framework's arrays, whose first axis counts the rows."""
        return self.backend.map(lambda *leaves: self.backend.xp.stack(leaves), rows[0], *rows[1:])

    def collect(self, rows: Any) -> Tree:
        """Return rows, or a list of trees, as one tree of NumPy arrays whose first axis counts the rows.

        While a compiler traces, the result holds arrays of the framework.
        """
        if not isinstance(rows, list):
            return rows
        backend = self.backend

        def column(*leaves: Any) -> Any:
            return np.stack([backend.to_numpy(x) if backend.owns(x) else np.asarray(x) for x in leaves])

        return backend.map(column, rows[0], *rows[1:])
