"""What eager backends share: trees by optree, and loops that are Python's.

A backend takes the functions it wants, ``flatten = staticmethod(eager.flatten)``; nothing is inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import optree

from hypergrad.backend import Tree


def flatten(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
    """Take a tree apart, and return what puts leaves back together."""
    leaves, spec = optree.tree_flatten(tree)
    return leaves, spec.unflatten


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
    for k in reversed(range(length)) if reverse else range(length):
        carry, ys[k] = body(carry, k, None if xs is None else xs[k])
    return carry, ys


def while_loop(going: Callable[[Tree], Any], body: Callable[[Tree], Tree], carry: Tree, limit: int) -> Tree:
    """Run the body while it is going, and never more often than the limit."""
    for _ in range(limit):
        if not going(carry):
            break
        carry = body(carry)
    return carry


def indexed(items: Sequence[Tree]) -> Callable[[Any], Tree]:
    """K -> items[k]."""
    return items.__getitem__
