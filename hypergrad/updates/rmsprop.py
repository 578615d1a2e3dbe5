"""RMSprop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.updates.base import Hyper, UpdateRule, check_range, is_off, resolve, safe_sqrt


class Square(NamedTuple):
    """Running mean of the squared gradient, and the velocity if there is momentum."""

    square: Tree
    velocity: Tree


@final
@dataclass(frozen=True)
class RMSprop(UpdateRule):
    r"""RMSprop (Tieleman and Hinton 2012), as ``torch.optim.RMSprop``.

        g ← ∇C̃1 + w θ                   w: weight_decay
        s ← α s + (1 − α) g²
        b ← μ b + g / (√s + ε)           μ: momentum
        θ ← θ − η b                      η: lr

    One copy of θ as state, two with momentum. The derivative of √s at 0 is taken as 0, which is exact
    here: see `hypergrad.updates.base.safe_sqrt`. Each of ``lr, alpha, eps, momentum, weight_decay`` is a
    number, a function of the hyperparameters, or a `Schedule`.

    Raises:
        ArgumentError: for a number outside of its range.
    """

    lr: Hyper = 1e-2
    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    momentum: Hyper = 0.0
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_range("RMSprop", name, getattr(self, name), 0.0, float("inf"))
        for name in ("alpha", "momentum"):
            check_range("RMSprop", name, getattr(self, name), 0.0, 1.0)

    def init(self, backend: Backend, params: Tree) -> Tree:
        return Square(backend.zeros(params), () if is_off(self.momentum) else backend.zeros(params))

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        lr, alpha, eps = (
            resolve(backend, name, getattr(self, name), hparams, step) for name in ("lr", "alpha", "eps")
        )
        if not is_off(self.weight_decay):
            decay = resolve(backend, "weight_decay", self.weight_decay, hparams, step)
            gradient = backend.axpy(decay, params, gradient)
        square = backend.map(lambda s, g: alpha * s + (1 - alpha) * g * g, opt_state.square, gradient)
        direction = backend.map(lambda g, s: g / (safe_sqrt(backend, s) + eps), gradient, square)
        velocity = opt_state.velocity
        if not is_off(self.momentum):
            momentum = resolve(backend, "momentum", self.momentum, hparams, step)
            direction = velocity = backend.axpy(momentum, velocity, direction)
        return backend.axpy(-lr, direction, params), Square(square, velocity)
