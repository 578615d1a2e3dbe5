"""Operations of torch whose derivative is zero wherever it exists, though its graph has a node for them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, partial
from typing import Any, NamedTuple, final

from hypergrad_torch.private import Node, nodes_before, saved_as

FLAT = {
    # Values without a slope, and draws whose parameters torch does not differentiate.
    "AngleBackward0": {0},
    "BernoulliBackward0": {0},
    "BernoulliBackward1": {0, 1},
    "BernoulliBackward2": {0},
    "CeilBackward0": {0},
    "CopysignBackward0": {1},
    "FloorBackward0": {0},
    "NextafterBackward0": {1},
    "NormalBackward1": {0},
    "NormalBackward2": {0},
    "NormalBackward3": {0, 1},
    "PoissonBackward0": {0},
    "RoundBackward0": {0},
    "RoundBackward1": {0},
    "SgnBackward0": {0},
    "SignBackward0": {0},
    "TruncBackward0": {0},
    # Gradients of what is linear in pieces, by the point at which they are taken.
    "AdaptiveMaxPool2DBackwardBackward0": {1},
    "AdaptiveMaxPool3DBackwardBackward0": {1},
    "FractionalMaxPool2DBackwardBackward0": {1},
    "FractionalMaxPool3DBackwardBackward0": {1},
    "HardshrinkBackwardBackward0": {1},
    "HardtanhBackwardBackward0": {1},
    "LeakyReluBackwardBackward0": {1},
    "MaxPool2DWithIndicesBackwardBackward0": {1},
    "MaxPool3DWithIndicesBackwardBackward0": {1},
    "RreluWithNoiseBackwardBackward0": {1},
    "SoftshrinkBackwardBackward0": {1},
    "ThresholdBackwardBackward0": {1},
}
"""For each kind of node the inputs in which it has no slope: among all operators of torch 2.13, the nodes
that gave exact zeros to an input for every cotangent, unless it gives nothing but its shape."""

_ROUNDED = {"DivBackward2", "DivBackward3"}
"""Divisions, which may have a ``rounding_mode``."""


def flat_inputs(node: Any) -> set[int]:
    """The inputs in which the node's operation has no slope."""
    name = node.__class__.__name__
    if name in _ROUNDED:
        return {0, 1} if saved_as(node, "rounding_mode") is not None else set()
    return FLAT.get(name, set())


@final
class History(NamedTuple):
    """The nodes of a graph from some outputs back to where it begins.

    ``sloped`` are those among them to which a derivative comes, and ``flat`` those that have inputs without
    a slope.
    """

    nodes: set[Node]
    sloped: set[Node]
    flat: list[Node]

    @classmethod
    def of(cls, outputs: list[Node], ends: Collection[Node]) -> History:
        """Return the nodes before the outputs, these included, and nothing before the ``ends``."""
        nodes, todo, behind_flat = set(outputs), list(outputs), list[Node]()
        with_flat = list[Node]()
        while todo:
            node = todo.pop()
            if node in ends:
                continue
            flat = flat_inputs(node) if _may_be_flat(node.__class__) else ()
            if flat:
                with_flat.append(node)
            for i, (parent, _) in enumerate(node.next_functions):
                if parent is None or parent in nodes:
                    continue
                if i in flat:
                    behind_flat.append(parent)
                else:
                    nodes.add(parent)
                    todo.append(parent)
        rest = [node for node in behind_flat if node not in nodes]
        if not rest:
            return cls(nodes, nodes, with_flat)
        behind = nodes_before(rest, {*ends, *nodes})
        return cls(nodes | behind, nodes, with_flat)

    def cut_flat(self) -> None:
        """Have the flat nodes give no gradient where they would give zeros.

        A product with such zeros would depend on its other factor by the graph, and not by its value.
        """
        for node in self.flat:
            node.register_hook(partial(_without, flat_inputs(node)))


def _without(flat: set[int], gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
    return tuple(None if i in flat else g for i, g in enumerate(gradients))


@cache
def _may_be_flat(kind: Any) -> bool:
    return kind.__name__ in FLAT or kind.__name__ in _ROUNDED
