"""The bilevel problem: two losses and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Scalar, Tree
from hypergrad.errors import ArgumentError

Loss = Callable[..., Any]


@final
@dataclass(frozen=True)
class Bilevel:
    r"""Minimise C2(θ, λ) over the hyperparameters λ, where training on C̃1(θ, λ) made the parameters θ.

        C̃1 = C1 + Ω   on the training set T1       (Luketina et al. 2016, eq. 1)
        C2            on the validation set T2

    Both losses are called as ``loss(params, hparams, batch)`` and return a scalar. Parameters,
    hyperparameters and batches are any trees of the framework's own arrays; they reach the losses as
    they are, never wrapped and never copied. A loss of the NumPy backend is written with
    ``autograd.numpy``.

    One array at two places of a tree makes two parameters, as everywhere in functional code. To tie
    parameters, keep one leaf and use it twice inside the loss.

    What a model updates while it trains, and nobody differentiates by, is its auxiliary state: running
    statistics of a BatchNorm, a key or a counter for its noise. With ``has_aux`` it goes through the losses,
    and through training from step to step, as a constant of every derivative::

        inner(params, hparams, batch, aux) -> (scalar, aux)
        outer(params, hparams, batch, aux) -> scalar
        state = estimator.init(problem, params, hparams, aux=aux)

    Args:
        inner: the regularised training loss C̃1.
        outer: the validation loss C2.
        has_aux: do the losses take an auxiliary state, and does the inner one return the next?

    Raises:
        ArgumentError: if either is not callable.
    """

    inner: Loss
    outer: Loss
    has_aux: bool = False

    def __post_init__(self) -> None:
        for name in ("inner", "outer"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"Bilevel: {name} must be a function (params, hparams, batch) -> scalar")

    def training_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> tuple[Scalar, Tree]:
        """C̃1 and the next auxiliary state.

        Raises:
            ArgumentError: if ``inner`` should return two things, and does not.
        """
        if not self.has_aux:
            return self.inner(params, hparams, batch), aux
        result = self.inner(params, hparams, batch, aux)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ArgumentError(
                f"inner returned {type(result).__name__}: with has_aux=True it returns (loss, aux), the "
                "loss and the next auxiliary state"
            )
        return result

    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        """C2."""
        return self.outer(params, hparams, batch, *([aux] if self.has_aux else []))
