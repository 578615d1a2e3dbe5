"""RMSprop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.updates.formula import Formula, Hyper, check_range, is_off, safe_sqrt


class Square(NamedTuple):
    """Running mean of the squared gradient, velocity if there is momentum, mean gradient if centred."""

    square: Tree
    velocity: Tree
    mean: Tree = ()


@final
@dataclass(frozen=True)
class RMSprop(Formula):
    r"""RMSprop (Tieleman and Hinton 2012), as ``torch.optim.RMSprop``.

        g ← ∇C̃1 + w θ                   w: weight_decay
        s ← α s + (1 − α) g²
        b ← μ b + g / (√s + ε)           μ: momentum;  centered: √(s − m²), m ← α m + (1 − α) g
        θ ← θ − η b                      η: lr

    One copy of θ as state, one more with momentum and one more if centred. The derivative of √s at 0 is
    taken as 0, which is exact here: see `hypergrad.updates.formula.safe_sqrt`. Each of ``lr, alpha, eps,
    momentum, weight_decay`` is a `hypergrad.updates.Hyper`: a number, a function of the hyperparameters, or a
    `Schedule`, of one rate or of a tree of them.

    Raises:
        ArgumentError: for a number outside its range.
    """

    hypers: ClassVar[tuple[str, ...]] = ("lr", "alpha", "eps", "momentum", "weight_decay")

    lr: Hyper = 1e-2
    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    momentum: Hyper = 0.0
    weight_decay: Hyper = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_range("RMSprop", name, getattr(self, name), 0.0, float("inf"))
        for name in ("alpha", "momentum"):
            check_range("RMSprop", name, getattr(self, name), 0.0, 1.0)

    def init(self, backend: Backend, params: Tree) -> Tree:
        zeros = backend.zeros(params)
        return Square(zeros, () if is_off(self.momentum) else zeros, zeros if self.centered else ())

    def step(
        self, backend: Backend, rates: Any, gradient: Tree, opt_state: Tree, params: Tree, t: Any
    ) -> tuple[Tree, Tree]:
        alpha = rates.alpha
        if not is_off(self.weight_decay):
            gradient = backend.axpy(rates.weight_decay, params, gradient)
        square = backend.map(lambda s, g: alpha * s + (1 - alpha) * g * g, opt_state.square, gradient)
        mean, variance = opt_state.mean, square
        if self.centered:
            mean = backend.map(lambda m, g: alpha * m + (1 - alpha) * g, mean, gradient)
            variance = backend.map(lambda s, m: s - m * m, square, mean)
        direction = backend.map(lambda g, s: g / (safe_sqrt(backend, s) + rates.eps), gradient, variance)
        velocity = opt_state.velocity
        if not is_off(self.momentum):
            direction = velocity = backend.axpy(rates.momentum, velocity, direction)
        return backend.axpy(-rates.lr, direction, params), Square(square, velocity, mean)
