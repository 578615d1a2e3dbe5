"""Checkpoints of runs: named arrays, and a head that says which recipe and which tree they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import CheckpointError
from hypergrad.tuning.described import described, differences
from hypergrad.tuning.files import Head
from hypergrad.version import __version__

FORMAT = 1
"""The version of what a head and its arrays mean. Files of another one are refused."""
LARGEST_LIST = 20
"""A message lists no more differences than these."""


def head_of(kind: str, backend: Backend | None, recipe: Any, leaves: dict[str, str]) -> Head:
    """Return the head of a checkpoint: versions, what wrote it, and its tree as leaves by their paths."""
    return {
        "format": FORMAT,
        "library": __version__,
        "kind": kind,
        "backend": None if backend is None else backend.name,
        "recipe": None if backend is None else described(backend, recipe),
        "leaves": leaves,
    }


def check_head(head: Any, here: Head, what: str) -> None:
    """Check that a checkpoint belongs to what reads it; ``here`` is the head that this would write now.

    The version of the library need not be the same.

    Raises:
        CheckpointError: if it does not; the message lists all differences.
    """
    if not isinstance(head, dict):
        raise CheckpointError(f"{what} has no head, and was not written by hypergrad")
    if type(number := head.get("format")) is not int or number != FORMAT:
        raise CheckpointError(f"{what} has format {number!r}, and this version reads format {FORMAT}")
    mine = {key: x for key, x in here.items() if key not in ("format", "library")}
    theirs = {key: head.get(key) for key in mine}
    if found := differences(theirs, mine):
        more = [f"and {len(found) - LARGEST_LIST} more"] if len(found) > LARGEST_LIST else []
        lines = "\n".join(f"  {line}" for line in found[:LARGEST_LIST] + more)
        remedy = (
            " To go on with another recipe, load it with its own one, and hand what you get to the other."
            if any(line.startswith("recipe") for line in found)
            else ""
        )
        raise CheckpointError(
            f"{what} belongs to another run:\n{lines}\n  It was written by hypergrad {head.get('library')}, "
            f"and this is {__version__}.{remedy}"
        )


def leaf_names(backend: Backend, root: str, tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths from its root."""
    return dict(zip(backend.paths(tree, root), backend.flatten(tree)[0], strict=True))


def leaves_of(backend: Backend, root: str, tree: Tree) -> dict[str, str]:
    """Return dtype and shape of each leaf by its path, such as ``float64 (3, 4)``."""
    return {path: _leaf(leaf) for path, leaf in leaf_names(backend, root, tree).items()}


def _leaf(leaf: Any) -> str:
    shape = tuple(getattr(leaf, "shape", ()))
    dtype = str(getattr(leaf, "dtype", type(leaf).__name__)).removeprefix("torch.")
    # A counter may be an int or an array.
    return "integer" if shape == () and "int" in dtype else f"{dtype} {shape}"


def tree_arrays(backend: Backend, root: str, tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree as NumPy arrays, by their paths from its root.

    Numbers of a dtype that NumPy does not have, such as bfloat16, become integers with the same bits.
    """
    return {path: _bits(backend.to_numpy(leaf)) for path, leaf in leaf_names(backend, root, tree).items()}


def _bits(array: Any) -> Any:
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def restore_tree(backend: Backend, root: str, model: Tree, stored: dict[str, Any]) -> Tree:
    """Return a tree like the model, with the stored leaves that `tree_arrays` made.

    Raises:
        CheckpointError: if an array is not as its head said it is.
    """
    if differing := sorted(stored.keys() ^ leaf_names(backend, root, model).keys()):
        raise CheckpointError(f"the arrays of a checkpoint are not those of its head: {differing}")
    restored = []
    for path, leaf in leaf_names(backend, root, model).items():
        like = backend.to_numpy(leaf)
        bits, values = _bits(like), stored[path]
        counts = bits.shape == () and bits.dtype.kind in "iu"
        kinds: Sequence[Any] = ("i", "u") if counts else (bits.dtype.kind,)
        if values.shape != bits.shape or values.dtype.kind not in kinds:
            raise CheckpointError(f"{path} is not the array that the head of its checkpoint describes")
        if not counts and values.dtype != bits.dtype:
            raise CheckpointError(f"{path} holds {values.dtype}, and its head says {_leaf(leaf)}")
        values = values.view(like.dtype) if like.dtype.kind == "V" else values
        restored.append(int(values) if isinstance(leaf, int) else backend.asarray(values, like=leaf))
    return backend.flatten(model)[1](restored)


def check_counters(counters: dict[str, Any]) -> None:
    """Check numbers that count something.

    Raises:
        CheckpointError: if one is not a whole number of at least 0.
    """
    for name, value in counters.items():
        whole = isinstance(value, int | np.integer) or getattr(value, "shape", None) == ()
        if isinstance(value, bool) or not whole or not 0 <= int(value) == value:
            raise CheckpointError(f"{name} = {value!r}; it must be a whole number of at least 0")
