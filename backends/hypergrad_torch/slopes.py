"""Operations of torch whose derivative is zero wherever it exists, though its graph has a node for them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

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


def any_flat(nodes: Iterable[Any]) -> bool:
    """Is there an operation without a slope among the nodes?"""
    return any(_may_be_flat(kind) for kind in {node.__class__ for node in nodes})


def flat_inputs(node: Any) -> set[int]:
    """The inputs in which the node's operation has no slope."""
    name = node.__class__.__name__
    if name in _ROUNDED:
        return {0, 1} if node._saved_rounding_mode is not None else set()
    return FLAT.get(name, set())


@cache
def _may_be_flat(kind: Any) -> bool:
    return kind.__name__ in FLAT or kind.__name__ in _ROUNDED
