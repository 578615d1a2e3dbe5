"""The interface of problems: a condition that parameters satisfy, and a validation loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.finite import first_nonfinite
from hypergrad.errors import ArgumentError
from hypergrad.problems.condition import Condition, Spent
from hypergrad.problems.losses import evaluate
from hypergrad.solvers.system import Image

Loss = Callable[..., Any]


class Validation(NamedTuple):
    """C2 and its derivatives at one point: the value, v = ∂_θ C2, ∂_λ C2, and which λ it depends on.

    ``bad_leaf`` is the first leaf of v that is not finite, −1 if there is none. ``uses`` finds which λ the
    value is computed from, slope or not, at the cost of an evaluation.
    """

    value: Scalar
    v: Tree
    direct: Tree
    reached: Tree
    bad_leaf: Any
    uses: Callable[[], Tree]


class Problem(ABC):
    r"""Minimise C2(θ, λ) over the hyperparameters λ, where the parameters θ solve G(θ, λ) = 0.

    G is ∇_θ C̃1 where a loss C̃1 is trained on; elsewhere it takes the place of this gradient in a training
    step. Estimators use nothing else of a problem: only G, C2, and their derivatives.
    """

    symmetric: ClassVar[bool] = True
    """Is ∂_θ G symmetric, as a Hessian is?"""
    definite: bool = True
    """Is ∂_θ G positive definite at a solution, as the Hessian is at a minimum?"""
    by_hand: ClassVar[bool] = False
    """Are its derivatives given by the user, so that no framework computes them?"""
    has_aux: bool = False

    @abstractmethod
    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        """Return C̃1, G as a differentiable function of θ and λ, and the next auxiliary state."""

    def loss_on(
        self, backend: Backend, batch: Tree, aux: Tree
    ) -> Callable[[Tree, Tree], tuple[Scalar, Tree]]:
        """Return C̃1 on a batch, as a function (θ, λ) -> (C̃1, next auxiliary state).

        Raises:
            ArgumentError: if there is no training loss that a framework differentiates.
        """
        raise ArgumentError(f"{type(self).__name__} has no training loss that a framework differentiates")

    @abstractmethod
    def uses(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        """Return which hyperparameters C̃1, or what takes its place, is computed from, slope or not.

        Cost: one evaluation.
        """

    def residual(
        self, backend: Backend, params: Tree, hparams: Tree, batches: list[Tree], aux: Tree
    ) -> tuple[Scalar, Tree]:
        """Return C̃1 and G, averaged over the batches; the auxiliary state does not change."""
        pairs = [self.inner_gradient(backend, params, hparams, batch, aux)[:2] for batch in batches]
        # Averaged separately: a framework that adds all leaves in one operation would put C̃1 into G's graph.
        value, g = (vectors.mean(backend, list(part)) for part in zip(*pairs, strict=True))
        return value, g

    def condition(
        self, backend: Backend, params: Tree, hparams: Tree, batches: list[Tree], aux: Tree
    ) -> Condition:
        """Return G and exact products with its derivatives, each a pull-back through one common graph."""

        def residual(params: Tree, hparams: Tree) -> tuple[Tree, tuple[Scalar, Tree]]:
            value, g = self.residual(backend, params, hparams, batches, aux)
            return g, (value, g)

        _, pullback, (value, g) = backend.vjp(residual, params, hparams)
        count = len(batches)
        return Condition(
            value,
            g,
            pullback.onto(0),
            lambda x: Image(*pullback(x)),
            lambda: pullback.reached[1],
            lambda products: Spent(count + 1, count * (products + 1), pullback.nbytes),
        )

    @abstractmethod
    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        """Return C2."""

    def validation(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Validation:
        """Return C2 and both of its gradients, from one backward pass."""

        def loss(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
            own_aux = backend.copy(aux) if self.has_aux else aux
            return self.validation_loss(params, hparams, batch, own_aux), None

        value, pullback, _ = evaluate(backend, "outer", loss, batch, params, hparams)
        v, direct = pullback(backend.xp.ones_like(value))
        bad_leaf = first_nonfinite(backend, backend.detach(v))

        def uses() -> Tree:
            with backend.as_called():
                return backend.uses(loss, params, hparams)[1]

        return Validation(value, v, direct, pullback.reached[1], bad_leaf, uses)
