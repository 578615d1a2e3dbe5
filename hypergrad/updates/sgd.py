"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.updates.formula import Formula, Hyper, check_range, is_off


class Momentum(NamedTuple):
    """The running sum of gradients."""

    velocity: Tree


@final
@dataclass(frozen=True)
class SGD(Formula):
    r"""Gradient descent with heavy-ball or Nesterov momentum, as ``torch.optim.SGD``.

        g ← ∇C̃1 + w θ          w: weight_decay
        b ← μ b + (1 − δ) g     μ: momentum,  δ: dampening;  b ← g in the first step
        θ ← θ − η b             η: lr;  with nesterov: θ ← θ − η (g + μ b)

    One copy of θ as state if there is momentum, none otherwise. Each of ``lr``, ``momentum``, ``dampening``
    and ``weight_decay`` is a `hypergrad.updates.Hyper`: a number, a function of the hyperparameters, or a
    `Schedule`, of one rate or of a tree of them.

    Raises:
        ArgumentError: for a negative number, a momentum of 1 or more, or Nesterov without momentum or with
            dampening.
    """

    hypers: ClassVar[tuple[str, ...]] = ("lr", "momentum", "weight_decay", "dampening")

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

    def step(
        self, backend: Backend, rates: Any, gradient: Tree, opt_state: Tree, params: Tree, t: Any
    ) -> tuple[Tree, Tree]:
        if not is_off(self.weight_decay):
            gradient = backend.axpy(rates.weight_decay, params, gradient)
        if is_off(self.momentum):
            return backend.axpy(-rates.lr, gradient, params), opt_state
        fresh = gradient if is_off(self.dampening) else damped(backend, rates.dampening, gradient, t)
        velocity = backend.axpy(rates.momentum, opt_state.velocity, fresh)
        direction = backend.axpy(rates.momentum, velocity, gradient) if self.nesterov else velocity
        return backend.axpy(-rates.lr, direction, params), Momentum(velocity)


def damped(backend: Backend, dampening: Any, gradient: Tree, t: Any) -> Tree:
    """Return what is added to the running sum: (1 − δ) g, and g in the first step."""
    return backend.axpy(_after_first(backend, t, gradient) * -dampening, gradient, gradient)


def _after_first(backend: Backend, step: Any, params: Tree) -> Any:
    """Return 0 in the first step and 1 in the others."""
    if isinstance(step, int):
        return float(step > 0)
    one = backend.asarray(1.0, like=backend.flatten(params)[0][0])
    return backend.xp.where(step > 0, one, 0.0 * one)
