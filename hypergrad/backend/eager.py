"""What eager backends share: trees by optree, and loops that are Python's.

A backend takes the functions it wants, ``flatten = staticmethod(eager.flatten)``; nothing is inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import optree

from hypergrad.backend.protocol import Backend, Tree
from hypergrad.errors import UnsupportedOpError


def flatten(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
    """Take a tree apart, and return what puts leaves back together."""
    leaves, spec = optree.tree_flatten(tree)
    return leaves, spec.unflatten


leaves = optree.tree_leaves


def paths(tree: Tree, root: str) -> list[str]:
    """Name every leaf as one would write it in Python."""
    return list(_paths(optree.tree_structure(tree), root))


@lru_cache(maxsize=256)
def _paths(spec: optree.PyTreeSpec, root: str) -> tuple[str, ...]:
    return tuple(accessor.codify(root) for accessor in spec.accessors())


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:  # noqa: A001 - the protocol's own name
    """Apply f leaf by leaf."""
    return optree.tree_map(f, tree, *rest)


def scan(
    body: Callable[[Tree, Any, Any], tuple[Tree, Any]],
    carry: Tree,
    length: int,
    xs: Any = None,
    reverse: bool = False,
) -> tuple[Tree, Any]:
    """Run the body for k = 0 … length−1; the outputs are kept in a list."""
    ys: list[Any] = [None] * length
    # The body alone holds the carry, and may let go of parts of it that it has no more use for.
    held = [carry]
    del carry
    for k in reversed(range(length)) if reverse else range(length):
        after, ys[k] = body(held.pop(), k, None if xs is None else xs[k])
        held.append(after)
        del after
    return held.pop(), ys


def while_loop(going: Callable[[Tree], Any], body: Callable[[Tree], Tree], carry: Tree, limit: int) -> Tree:
    """Run the body while it is going, and never more often than the limit."""
    for _ in range(limit):
        if not going(carry):
            break
        carry = body(carry)
    return carry


def repeat(
    body: Callable[[Tree, Any], tuple[Tree, Tree, Tree, Any]], carry: Tree, limit: int
) -> tuple[Tree, list[Tree], Tree, int]:
    """Run the body while it is going; what it raises ends the loop too."""
    rows, last = [], None
    for k in range(limit):
        carry, row, last, going = body(carry, k)
        rows.append(row)
        if not going:
            break
    return carry, rows, last, len(rows)


def each(f: Callable[..., Tree], *items: Sequence[Tree]) -> list[Tree]:
    """One after the other."""
    return [f(*row) for row in zip(*items, strict=True)]


def cond(pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
    """One of the two."""
    return yes() if pred else no()


def compile(f: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001 - the protocol's own name
    """The function as it is."""
    return f


def tell(listener: Callable[..., None], *values: Any) -> None:
    """Call it."""
    listener(*values)


def stack(items: Sequence[Tree]) -> Sequence[Tree]:
    """A list is one."""
    return items


def room(like: Tree, places: int) -> list[Tree]:
    """An empty list."""
    return [None] * places


def put(items: list[Tree], k: int, item: Tree) -> list[Tree]:
    """In place."""
    items[k] = item
    return items


def take(items: Sequence[Tree], k: int) -> Tree:
    """items[k]."""
    return items[k]


BLOCK, BLOCKS = 2**15, 64
"""Elements that are enough for a block, and blocks that are enough for an array."""


def blocks(shape: Sequence[int], block: int = BLOCK) -> int:
    """Into how many blocks of rows an array is cut."""
    return max(1, min(BLOCKS, int(np.prod(shape)) // block, shape[0] if len(shape) else 1))


def elementwise(
    f: Callable[..., tuple[Sequence[Any], Any]],
    used: Sequence[Any],
    given: Sequence[Any],
    block: int = BLOCK,
) -> tuple[list[Any], Any]:
    """In place and block by block, so that what f makes on its way has the size of a block."""
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


@dataclass(frozen=True)
class Push:
    """ẋ ↦ ∂f ẋ at one linearisation: the pullback is linear in its cotangent, and this is its transpose."""

    transpose: Callable[[Tree], tuple[Tree, ...]]
    reached: tuple[Tree, ...]

    def __call__(self, *tangents: Tree) -> Tree:
        return self.transpose(tangents)[0]


def linearize(backend: Backend, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
    """f, with its pullback pulled back: two gradients once, and as many for each tangent."""
    value, pullback, *aux = backend.vjp(f, *primals, has_aux=has_aux)
    _, transpose = backend.vjp(pullback, backend.zeros(value))
    return (value, Push(transpose, pullback.reached), *aux)


@dataclass(frozen=True)
class LinearSolve:
    """The solution of a linear system as a constant x̂, and x ← x + A⁻¹(v − A x) for each derivative.

    Such a step adds 0 to x and makes one more of its derivatives right, if A⁻¹ is taken as a constant whose
    transpose is a solve. ``depth`` says of a leaf how many derivatives pass through it, and
    ``pulled_by(y, pull)`` is zero, with the pullback ``pull``.
    """

    backend: Backend
    depth: Callable[[Any], int]
    pulled_by: Callable[[Any, Callable[[Any], Any]], Any]
    again: Callable[..., tuple[Tree, Tree]]
    symmetric: bool

    def __call__(
        self, matvec: Callable[[Tree], Tree], v: Tree, solve: Callable[..., Any], orders: int | None = None
    ) -> tuple[Tree, Tree]:
        """x, and what was seen; good for so many derivatives, or for all that are being taken."""
        backend = self.backend
        seen = [self.depth(leaf) for leaf in backend.flatten(v)[0]]

        def product(p: Tree) -> Tree:
            image = matvec(p)
            seen.extend(self.depth(leaf) for leaf in backend.flatten(image)[0])
            return backend.detach(image)

        x, found = solve(product, backend.detach(v))
        deepest = max(seen)
        if deepest == 0:
            return x, found
        x, orders = backend.detach(x), deepest if orders is None else orders

        def transposed(p: Tree) -> Tree:
            return matvec(p) if self.symmetric else backend.vjp(matvec, backend.zeros(v))[1](p)[0]

        def pull(g: Any) -> Any:
            if orders == 0:
                raise UnsupportedOpError(
                    "a derivative of a linear solve was asked for that is of a higher order than those being "
                    "taken when it was solved: hypergradient(differentiable=True) is good for one more"
                )
            return backend.ravel(self(transposed, unravel(g), self.again, orders - 1)[0])[0]

        for _ in range(max(orders, 1)):
            flat, unravel = backend.ravel(backend.axpy(-1.0, matvec(x), v))
            x = backend.axpy(1.0, unravel(self.pulled_by(flat, pull)), x)
        return x, backend.detach(found)


def normal(backend: Backend, seed: int, count: int, shape: tuple[int, ...], like: Any) -> Any:
    """NumPy's numbers."""
    return backend.asarray(np.random.default_rng((seed, int(count))).standard_normal(shape), like=like)


def dense(backend: Backend, rows: Sequence[Tree]) -> Tree:
    """The rows stacked, leaf by leaf."""
    return backend.map(lambda *leaves: backend.xp.stack(leaves), rows[0], *rows[1:])


def collect(backend: Backend, rows: Sequence[Tree]) -> Tree:
    """Rows as one tree of NumPy arrays; what is no list is one already."""
    if not isinstance(rows, list):
        return rows

    def column(*leaves: Any) -> Any:
        return np.stack([backend.to_numpy(x) if backend.owns(x) else np.asarray(x) for x in leaves])

    return backend.map(column, rows[0], *rows[1:])
