"""A problem of two losses: one to train on, one to validate on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.backend.arguments import check_same
from hypergrad.errors import ArgumentError
from hypergrad.problems.base import Loss, Problem
from hypergrad.problems.level import lagrangian
from hypergrad.problems.losses import evaluate


@final
@dataclass(frozen=True)
class Bilevel(Problem):
    r"""Minimise C2(θ, λ) over the hyperparameters λ, where the parameters θ result from training on C̃1(θ, λ).

        C̃1 = C1 + Ω   on the training set T1       (Luketina et al. 2016, eq. 1)
        C2            on the validation set T2

    Both losses are called as ``loss(params, hparams, batch)`` and return a scalar. Parameters,
    hyperparameters and batches are any trees of the framework's own arrays; they are passed to the losses
    unchanged, neither wrapped nor copied. A loss of the NumPy backend is written with ``autograd.numpy``.

    An array that occurs at two places of a tree counts as two parameters, as in all functional code. To tie
    parameters, keep one leaf and use it twice inside the loss.

    The auxiliary state of a model is what it updates while it trains without being differentiated by it: the
    running statistics of a BatchNorm, a key or a counter for its noise. With ``has_aux`` it is passed through
    the losses, and from one training step to the next, as a constant for every derivative. For instance, a
    hypergradient does not include the effect of noise in training on the running averages that normalise T2::

        inner(params, hparams, batch, aux) -> (scalar, aux)
        outer(params, hparams, batch, aux) -> scalar
        state = estimator.init(problem, params, hparams, aux=aux)

    For more levels, pass a bilevel problem as ``inner``: see `Level`.

    Args:
        inner: the regularised training loss C̃1, or the `Bilevel` problem of the level below.
        outer: the validation loss C2.
        has_aux: do the losses take an auxiliary state, and does the inner one return the next?

    Raises:
        ArgumentError: if a loss is not callable, or the level below has an auxiliary state.
    """

    inner: Loss | Bilevel
    outer: Loss
    has_aux: bool = False

    def __post_init__(self) -> None:
        for name in ("inner", "outer"):
            part = getattr(self, name)
            if not (callable(part) or (name == "inner" and isinstance(part, Bilevel))):
                raise ArgumentError(f"Bilevel: {name} must be a function (params, hparams, batch) -> scalar")
        if isinstance(self.inner, Bilevel) and (self.has_aux or self.inner.has_aux):
            raise ArgumentError("Bilevel: with more than two levels there can be no auxiliary state")

    @property
    def definite(self) -> bool:  # type: ignore[override]
        """False if ``inner`` is a problem: its Lagrangian has a saddle at the solution."""
        return not isinstance(self.inner, Bilevel)

    def training_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> tuple[Scalar, Tree]:
        """Return C̃1 and the next auxiliary state.

        Raises:
            ArgumentError: if ``has_aux`` is set and ``inner`` does not return a pair.
        """
        if isinstance(self.inner, Bilevel):
            return lagrangian(self.inner, params, hparams, batch), aux
        if not self.has_aux:
            return self.inner(params, hparams, batch), aux
        result = self.inner(params, hparams, batch, aux)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ArgumentError(
                f"inner returned {type(result).__name__}: with has_aux=True it returns (loss, aux), the "
                "loss and the next auxiliary state"
            )
        return result

    def loss_on(
        self, backend: Backend, batch: Tree, aux: Tree
    ) -> Callable[[Tree, Tree], tuple[Scalar, Tree]]:
        """Return C̃1 on a batch, as a function (θ, λ) -> (C̃1, next auxiliary state).

        Each call gets a copy of the auxiliary state: some losses write to it, as torch's BatchNorm does.

        Raises:
            ArgumentError, LeafTypeError: when called, if the next auxiliary state differs from this one in
                structure, shape or dtype.
        """

        def loss(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
            own_aux = backend.copy(aux) if self.has_aux else aux
            value, next_aux = self.training_loss(params, hparams, batch, own_aux)
            if self.has_aux:
                check_same(backend, "inner", next_aux, "aux", aux)
            return value, next_aux

        return loss

    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        loss = self.loss_on(backend, batch, aux)
        value, pullback, aux = evaluate(
            backend, "inner", lambda p: loss(p, hparams), batch, params, constants=hparams
        )
        (gradient,) = pullback(backend.xp.ones_like(value))
        return value, gradient, aux

    def uses(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        with backend.as_called():
            return backend.uses(self.loss_on(backend, batch, aux), params, hparams)[1]

    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        return self.outer(params, hparams, batch, *([aux] if self.has_aux else []))
