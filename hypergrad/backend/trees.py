"""Trees: arrays in nested containers, flattened and rebuilt by optree."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import optree

from hypergrad.backend.types import Tree


class Trees:
    """The containers that a framework accepts; by default those of optree. ``None`` is not a leaf."""

    def flatten(self, tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
        """Return the leaves of a tree, and a function that makes a tree of this structure from leaves."""
        leaves, spec = optree.tree_flatten(tree)
        return leaves, spec.unflatten

    def structure(self, tree: Tree) -> Hashable:
        """Return the containers without the leaves; equal for trees that can be passed to `map` together."""
        return optree.tree_structure(tree)

    def paths(self, tree: Tree, root: str) -> list[str]:
        """Return a name for each leaf, as it is written in Python: ``root['layers'][0]``."""
        return list(_paths(optree.tree_structure(tree), root))

    def map(self, f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
        """Return a tree of ``f(leaf, …)``. Trees in ``rest`` may have subtrees where the first has leaves."""
        return optree.tree_map(f, tree, *rest)


@lru_cache(maxsize=256)
def _paths(spec: optree.PyTreeSpec, root: str) -> tuple[str, ...]:
    return tuple(accessor.codify(root) for accessor in spec.accessors())
