"""JAX's own trees."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax

from hypergrad.backend import Tree
from hypergrad.backend.trees import Trees


class JaxTrees(Trees):
    """Trees by ``jax.tree_util``: the containers that are registered there."""

    def flatten(self, tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
        leaves, structure = jax.tree_util.tree_flatten(tree)
        return leaves, partial(jax.tree_util.tree_unflatten, structure)

    def structure(self, tree: Tree) -> Hashable:
        return jax.tree_util.tree_structure(tree)

    def paths(self, tree: Tree, root: str) -> list[str]:
        return [root + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    def map(self, f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
        return jax.tree_util.tree_map(f, tree, *rest)
