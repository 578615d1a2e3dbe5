"""The words of the protocol: arrays, trees, what is known of a leaf, and linear maps at a point."""

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
    """What a backend knows about one leaf without reading its values."""

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
    """u ↦ uᵀ ∂f/∂primals at one linearisation, to be called as often as needed."""

    @abstractmethod
    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        """Return uᵀ ∂f/∂primal for each primal; zeros where f does not depend on a leaf."""

    @property
    @abstractmethod
    def reached(self) -> tuple[Tree, ...]:
        """For each primal a tree of booleans: does f depend on this leaf? Read off the graph."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the arrays that the linearisation keeps alive."""

    def onto(self, k: int) -> Callable[[Tree], Tree]:
        """The part for the k-th primal alone, which may be cheaper."""
        return lambda cotangent: self(cotangent)[k]

    def last(self, cotangent: Tree) -> tuple[Tree, ...]:
        """Like a call, and the last one: what the linearisation keeps may be freed on the way."""
        return self(cotangent)


class Push(ABC):
    """ẋ ↦ ∂f ẋ at one linearisation, to be called as often as needed."""

    @abstractmethod
    def __call__(self, *tangents: Tree) -> Tree:
        """Return ∂f · tangents, one tangent for each primal."""

    @property
    @abstractmethod
    def reached(self) -> tuple[Tree, ...]:
        """As `Pullback.reached`."""
