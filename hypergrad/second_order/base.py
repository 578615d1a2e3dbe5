"""How the second derivatives of a training loss are multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.problems.base import Problem
from hypergrad.problems.condition import Condition
from hypergrad.problems.step import Inner, Training
from hypergrad.second_order.step import Step


class Products(ABC):
    """A way to take products with ∂²C̃1: with the Hessian ∂²_θθ C̃1, and with ∂²_λθ C̃1."""

    @abstractmethod
    def of(
        self, backend: Backend, problem: Problem, z: Inner, hparams: Tree, batches: list[Tree]
    ) -> Condition:
        """G at z, averaged over the batches, and products with its derivatives."""

    @abstractmethod
    def step(
        self, training: Training, z: Inner, hparams: Tree, batch: Tree, t: Any, through_update: bool
    ) -> Step:
        """A training step, and what pulls a cotangent of θ back to λ.

        That is through the whole update map, or through ∇_θ C̃1 alone.
        """

    def accepts(self, error: Scalar | None) -> Any:
        """Is the estimated error of a product small enough? A boolean array, or a boolean."""
        return True

    def check(self, error: Scalar | None) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse a product that is not accurate enough.

        Raises:
            DifferenceError: with the error.
        """
