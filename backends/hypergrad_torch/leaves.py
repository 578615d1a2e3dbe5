"""Which leaves of a tree are variables."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_float(leaf: Any) -> bool:
    """Is this leaf one to differentiate by?"""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and not is_fixed(leaf)


def is_fixed(leaf: Any) -> bool:
    """Is this a parameter of a module that its owner has frozen? A plain tensor's flag says nothing."""
    return leaf.__class__ is nn.Parameter and not leaf.requires_grad
