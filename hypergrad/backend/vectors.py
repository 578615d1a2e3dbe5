"""Trees as vectors: operations that many algorithms share, composed of the methods of a backend."""

from __future__ import annotations

from hypergrad.backend.protocol import Backend
from hypergrad.backend.types import Scalar, Tree


def scale(backend: Backend, a: Scalar, x: Tree) -> Tree:
    """Return a x."""
    return backend.axpy(a, x, backend.zeros(x))


def add(backend: Backend, x: Tree, y: Tree) -> Tree:
    """Return x + y."""
    return backend.axpy(1.0, x, y)


def subtract(backend: Backend, x: Tree, y: Tree) -> Tree:
    """Return x − y."""
    return backend.axpy(-1.0, y, x)


def mean(backend: Backend, trees: list[Tree]) -> Tree:
    """Return the mean of one tree or more."""
    total = trees[0]
    for tree in trees[1:]:
        total = add(backend, total, tree)
    return total if len(trees) == 1 else scale(backend, 1.0 / len(trees), total)


def norm(backend: Backend, x: Tree) -> Scalar:
    """Return the Euclidean norm ‖x‖, for reports: its derivative at zero is not defined."""
    return backend.xp.sqrt(backend.inner(x, x))


def nbytes(backend: Backend, tree: Tree) -> int:
    """Return the bytes of all leaves."""
    return sum(backend.describe(leaf).nbytes for leaf in backend.flatten(tree)[0] if backend.owns(leaf))


def size(backend: Backend, tree: Tree) -> int:
    """Return the number of scalars in a tree: the dimension of its space."""
    total = 0
    for leaf in backend.flatten(tree)[0]:
        count = 1
        for n in backend.describe(leaf).shape:
            count *= n
        total += count
    return total
