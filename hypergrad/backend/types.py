"""The types of the protocol: arrays, trees, descriptions of leaves, and derivatives at a point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Array = Any
"""An array of some framework."""
Scalar = Any
"""An array of shape (), or a Python number."""
Tree = Any
"""Arrays in containers that the framework knows: dicts, lists, tuples, dataclasses …"""
Kind = Literal["float", "int", "bool", "complex", "other"]


class Leaf(NamedTuple):
    """A description of a leaf, made without reading its values. ``itemsize`` is in bytes."""

    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    device: str

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf's data."""
        size = self.itemsize
        for n in self.shape:
            size *= n
        return size


class Pullback(ABC):
    """u ↦ uᵀ ∂f/∂primals at the point where f was evaluated. It can be called many times."""

    @abstractmethod
    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        """Return uᵀ ∂f/∂primal for each primal, zeros for leaves that f does not depend on."""

    @property
    @abstractmethod
    def reached(self) -> tuple[Tree, ...]:
        """For each primal a tree of booleans: whether f depends on the leaf, by its graph, not its values.

        It does not through operations that have no slope anywhere, such as a rounding.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the arrays that the graph keeps alive."""

    def onto(self, k: int) -> Callable[[Tree], Tree]:
        """Return u ↦ uᵀ ∂f/∂primal for the k-th primal alone, which may be cheaper."""
        return lambda cotangent: self(cotangent)[k]

    def last(self, cotangent: Tree) -> tuple[Tree, ...]:
        """Like a call, but it must be the last one, because it may free the graph as it goes."""
        return self(cotangent)


class Push(ABC):
    """ẋ ↦ ∂f ẋ at the point where f was evaluated. It can be called many times."""

    @abstractmethod
    def __call__(self, *tangents: Tree) -> Tree:
        """Return ∂f · tangents, one tangent for each primal."""

    @property
    @abstractmethod
    def reached(self) -> tuple[Tree, ...]:
        """Like `Pullback.reached`."""
