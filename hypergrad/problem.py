"""The bilevel problem: two losses and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from hypergrad.errors import ArgumentError

Loss = Callable[[Any, Any, Any], Any]


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

    Args:
        inner: the regularised training loss C̃1.
        outer: the validation loss C2.

    Raises:
        ArgumentError: if either is not callable.
    """

    inner: Loss
    outer: Loss

    def __post_init__(self) -> None:
        for name in ("inner", "outer"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"Bilevel: {name} must be a function (params, hparams, batch) -> scalar")
