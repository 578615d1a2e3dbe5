"""What a problem is: a condition that parameters satisfy, and a loss that judges them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.backend.finite import first_nonfinite
from hypergrad.problems.losses import evaluate

Loss = Callable[..., Any]


class Validation(NamedTuple):
    """C2 and its derivatives at one point: the value, v = ∂_θ C2, ∂_λ C2, and which λ it reaches.

    ``bad_leaf`` is the first leaf of v that is not finite, −1 if there is none.
    """

    value: Scalar
    v: Tree
    direct: Tree
    reached: Tree
    bad_leaf: Any


class Problem(ABC):
    r"""Minimise C2(θ, λ) over the hyperparameters λ, where the parameters θ solve G(θ, λ) = 0.

    G is ∇_θ C̃1 where a loss C̃1 is trained on, and whatever a step of training moves against elsewhere.
    Estimators see no more of a problem than this: G, C2, and their derivatives.
    """

    symmetric: ClassVar[bool] = True
    """Is ∂_θ G, as a Hessian is?"""
    definite: bool = True
    """Is ∂_θ G positive definite at a solution, as the Hessian is at a minimum?"""
    by_hand: ClassVar[bool] = False
    """Are its derivatives given, so that no framework takes them?"""
    has_aux: bool = False

    @abstractmethod
    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        """C̃1, G as a differentiable function of θ and λ, and the next auxiliary state."""

    @abstractmethod
    def reached(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        """Which hyperparameters are used in training at all, at the price of one evaluation."""

    @abstractmethod
    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        """C2."""

    def validation(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Validation:
        """C2 and both of its gradients: one backward pass."""

        def loss(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
            return self.validation_loss(params, hparams, batch, backend.copy(aux)), ()

        value, pullback, _ = evaluate(backend, "outer", loss, batch, params, hparams)
        v, direct = pullback(backend.xp.ones_like(value))
        bad_leaf = first_nonfinite(backend, backend.detach(v))
        return Validation(value, v, direct, pullback.reached[1], bad_leaf)
