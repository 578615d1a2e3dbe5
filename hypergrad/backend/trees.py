"""Trees: arrays in nested containers, taken apart and put together by optree."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import optree

from hypergrad.backend.types import Tree


class Trees:
    """The containers that a framework knows. By default they are optree's; ``None`` is no leaf."""

    def flatten(self, tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
        """Return the leaves of a tree, and what puts leaves back together."""
        leaves, spec = optree.tree_flatten(tree)
        return leaves, spec.unflatten

    def structure(self, tree: Tree) -> Hashable:
        """The containers without the leaves: equal for trees that `map` takes together."""
        return optree.tree_structure(tree)

    def paths(self, tree: Tree, root: str) -> list[str]:
        """Name every leaf as one would write it in Python, starting from the name of the tree."""
        return list(_paths(optree.tree_structure(tree), root))

    def map(self, f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
        """Apply f leaf by leaf; each tree in ``rest`` may go deeper than the first."""
        return optree.tree_map(f, tree, *rest)


@lru_cache(maxsize=256)
def _paths(spec: optree.PyTreeSpec, root: str) -> tuple[str, ...]:
    return tuple(accessor.codify(root) for accessor in spec.accessors())
