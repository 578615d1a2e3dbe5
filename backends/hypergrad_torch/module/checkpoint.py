"""Trees and histories as plain containers of tensors, which ``torch.load(…, weights_only=True)`` reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hypergrad.backend import Tree
from hypergrad.tuning import History
from hypergrad_torch.graph import trees


def write_tree(tree: Tree, root: str) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return dict(zip(trees.paths(tree, root), trees.flatten(tree)[0], strict=True))


def read_tree(stored: dict[str, Any], model: Tree, root: str) -> Tree:
    """A tree like the model, with copies of the leaves that `write_tree` wrote.

    Raises:
        ValueError: if they belong to a tree of another structure or shape.
    """
    expected = write_tree(model, root)
    check_shapes(root, shapes(stored), shapes(expected))
    values = (stored[path] for path in expected)
    return trees.flatten(model)[1]([x.clone() if isinstance(x, torch.Tensor) else x for x in values])


def shapes(leaves: dict[str, Any]) -> dict[str, Any]:
    """The shapes of the tensors among some leaves."""
    return {path: tuple(x.shape) if isinstance(x, torch.Tensor) else None for path, x in leaves.items()}


def check_shapes(name: str, mine: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that two trees have the same paths and shapes.

    Raises:
        ValueError: if they have not.
    """
    if mine != expected:
        raise ValueError(f"{name} has shapes {mine}, expected {expected}")


def write_history(history: History) -> dict[str, Any]:
    """The columns as tensors."""
    return {name: torch.from_numpy(np.array(column)) for name, column in history.arrays().items()}


def read_history(stored: dict[str, Any]) -> History:
    """What `write_history` wrote."""
    return History.from_arrays({name: column.numpy() for name, column in stored.items()})
