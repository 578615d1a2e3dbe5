"""Control flow: loops that a framework may make one program of, and Python's own as the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypergrad.backend.types import Tree


class Loops:
    """Loops, branches, compilation, and the rows that loops keep. By default everything runs as it is
    written.

    *Rows* are trees of one kind, kept in the framework's own way: a list here, one tree with a longer axis
    where loops are compiled. `scan`, `each`, `stack` and `empty_rows` make them, `take`, `set_row`, `dense`
    and `collect` read and write them.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend  # a Backend, which is made of this

    def scan(
        self,
        body: Callable[[Tree, Any, Any], tuple[Tree, Any]],
        carry: Tree,
        length: int,
        xs: Any = None,
        reverse: bool = False,
    ) -> tuple[Tree, Any]:
        """Run ``carry, y = body(carry, k, x)`` for k = 0 … length − 1 and return ``carry, ys``.

        ``ys`` are rows, in the order of k; all that one may do is hand them back as ``xs``, from which x is
        the one of the same k. In reverse k counts down.
        """
        ys: list[Any] = [None] * length
        # Only the body refers to the carry, so it can free those parts that it does not need any more.
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
        """Run the body while ``going(carry)``, which is false after ``limit`` rounds at the latest."""
        for _ in range(limit):
            if not going(carry):
                break
            carry = body(carry)
        return carry

    def repeat(
        self, body: Callable[[Tree, Any], tuple[Tree, Tree, Tree, Any]], carry: Tree, limit: int
    ) -> tuple[Tree, Any, Tree, Any]:
        """Run ``carry, row, last, going = body(carry, k)`` for k = 0 … limit − 1, limit ≥ 1, while it is
        going.

        Return ``carry, rows, last, count``: the rows, what the last round returned, and how many rounds ran.
        """
        rows, last = [], None
        for k in range(limit):
            carry, row, last, going = body(carry, k)
            rows.append(row)
            if not going:
                break
        return carry, rows, last, len(rows)

    def cond(self, pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
        """Return ``yes()`` if it holds, and ``no()`` if not.

        In a compiled program both have one structure: ``no`` may return ``None`` where ``yes`` returns a
        tree, and gets zeros there, NaN for floats.
        """
        return yes() if pred else no()

    def each(self, f: Callable[..., Tree], *items: Any) -> Any:
        """f(x, …) for each of the rows, kept as rows; all at once, if the framework can."""
        return [f(*row) for row in zip(*items, strict=True)]

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A function of trees of arrays as one program, if the framework makes programs; else the
        function.
        """
        return f

    def callback(self, listener: Callable[..., None], *values: Any) -> None:
        """Call the listener with the values once they are there: for progress, never for results."""
        listener(*values)

    def stack(self, items: Sequence[Tree]) -> Any:
        """Rows from a sequence of trees of one kind."""
        return items

    def take(self, items: Any, k: Any) -> Tree:
        """The k-th row; a `scan` may hand out k."""
        return items[k]

    def empty_rows(self, like: Tree, count: int) -> Any:
        """Rows for trees like this one, without a value until `set_row`."""
        return [None] * count

    def set_row(self, items: Any, k: Any, item: Tree) -> Any:
        """The rows with this one in the k-th place; those that were given are used up."""
        items[k] = item
        return items

    def dense(self, rows: Any) -> Tree:
        """Rows as one tree of the framework's arrays, whose first axis is k."""
        return self.backend.map(lambda *leaves: self.backend.xp.stack(leaves), rows[0], *rows[1:])

    def collect(self, rows: Any) -> Tree:
        """Rows, or a list of trees, as one tree of NumPy arrays whose first axis is k.

        While a compiler traces, they stay arrays of the framework.
        """
        if not isinstance(rows, list):
            return rows
        backend = self.backend

        def column(*leaves: Any) -> Any:
            return np.stack([backend.to_numpy(x) if backend.owns(x) else np.asarray(x) for x in leaves])

        return backend.map(column, rows[0], *rows[1:])
