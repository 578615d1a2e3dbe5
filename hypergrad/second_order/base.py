"""The interface of second-order products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.problems.base import Problem
from hypergrad.problems.condition import Condition
from hypergrad.problems.step import Inner, Training
from hypergrad.second_order.step import Step


class Products(ABC):
    """A way to compute products with ∂²C̃1: with the Hessian ∂²_θθ C̃1, and with ∂²_λθ C̃1."""

    @abstractmethod
    def of(
        self, backend: Backend, problem: Problem, z: Inner, hparams: Tree, batches: list[Tree]
    ) -> Condition:
        """Return G at z, averaged over the batches, and products with its derivatives."""

    @abstractmethod
    def step(
        self, training: Training, z: Inner, hparams: Tree, batch: Tree, t: Any, through_update: bool
    ) -> Step:
        """Take a training step, and return it with a function that pulls a cotangent of θ back to λ.

        With ``through_update`` this goes through the whole update map, otherwise through ∇_θ C̃1 alone.
        """

    def accepts(self, error: Scalar | None) -> Any:
        """Return whether the estimated error of a product is small enough: a boolean, or a boolean array."""
        return True

    def check(self, error: Scalar | None) -> None:  # noqa: B027 - exact products need no check
        """Check that a product is accurate enough.

        Raises:
            DifferenceError: if its error is too large.
        """
