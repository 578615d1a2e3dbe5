"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.updates.base import Hyper, UpdateRule, check_range, is_off, resolve


class Momentum(NamedTuple):
    """The running sum of gradients."""

    velocity: Tree


@final
@dataclass(frozen=True)
class SGD(UpdateRule):
    r"""Gradient descent with heavy-ball or Nesterov momentum, as ``torch.optim.SGD``.

        g ← ∇C̃1 + w θ          w: weight_decay
        b ← μ b + (1 − δ) g     μ: momentum,  δ: dampening;  b ← g in the first step
        θ ← θ − η b             η: lr;  with nesterov: θ ← θ − η (g + μ b)

    One copy of θ as state if there is momentum, none otherwise. Each of ``lr``, ``momentum``, ``dampening``
    and ``weight_decay`` is a number, a function of the hyperparameters, or a `Schedule`.

    Raises:
        ArgumentError: for a negative number, a momentum of 1 or more, or Nesterov without momentum or with
            dampening.
    """

    leafwise: ClassVar[bool] = True
    connected = True

    lr: Hyper
    momentum: Hyper = 0.0
    nesterov: bool = False
    weight_decay: Hyper = 0.0
    dampening: Hyper = 0.0

    def __post_init__(self) -> None:
        check_range("SGD", "lr", self.lr, 0.0, float("inf"))
        check_range("SGD", "momentum", self.momentum, 0.0, 1.0)
        check_range("SGD", "weight_decay", self.weight_decay, 0.0, float("inf"))
        check_range("SGD", "dampening", self.dampening, 0.0, float("inf"))
        if self.nesterov and (is_off(self.momentum) or not is_off(self.dampening)):
            raise ArgumentError("SGD: nesterov=True needs a momentum, and no dampening")

    def init(self, backend: Backend, params: Tree) -> Tree:
        return () if is_off(self.momentum) else Momentum(backend.zeros(params))

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        lr = resolve(backend, "lr", self.lr, hparams, step)
        gradient = self.decayed(backend, gradient, params, hparams, step)
        if is_off(self.momentum):
            return backend.axpy(-lr, gradient, params), opt_state
        momentum = resolve(backend, "momentum", self.momentum, hparams, step)
        fresh = self.damped(backend, gradient, hparams, step)
        velocity = backend.axpy(momentum, opt_state.velocity, fresh)
        direction = backend.axpy(momentum, velocity, gradient) if self.nesterov else velocity
        return backend.axpy(-lr, direction, params), Momentum(velocity)

    def decayed(self, backend: Backend, gradient: Tree, params: Tree, hparams: Tree, step: Any) -> Tree:
        """Return g + w θ."""
        if is_off(self.weight_decay):
            return gradient
        decay = resolve(backend, "weight_decay", self.weight_decay, hparams, step)
        return backend.axpy(decay, params, gradient)

    def damped(self, backend: Backend, gradient: Tree, hparams: Tree, step: Any) -> Tree:
        """Return (1 − δ) g, which is added to the running sum."""
        if is_off(self.dampening):
            return gradient
        dampening = resolve(backend, "dampening", self.dampening, hparams, step)
        return backend.axpy(_after_first(backend, step, gradient) * -dampening, gradient, gradient)


def _after_first(backend: Backend, step: Any, params: Tree) -> Any:
    """Return 0 in the first step and 1 in the others."""
    if isinstance(step, int):
        return float(step > 0)
    one = backend.asarray(1.0, like=backend.flatten(params)[0][0])
    return backend.xp.where(step > 0, one, 0.0 * one)
