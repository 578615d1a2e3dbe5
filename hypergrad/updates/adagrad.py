"""Adagrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Array, Backend, Tree
from hypergrad.updates.formula import Formula, Hyper, check_range, clock, fitted, is_off, safe_sqrt


class Total(NamedTuple):
    """The sum of all squared gradients so far."""

    square: Tree


@final
@dataclass(frozen=True)
class Adagrad(Formula):
    r"""Adagrad (Duchi et al. 2011, section 1.3), as ``torch.optim.Adagrad``.

        g ← ∇C̃1 + w θ                         w: weight_decay
        s ← s + g²                            s_0: initial_accumulator
        θ ← θ − η / (1 + t d) · g / (√s + ε)   η: lr,  d: lr_decay,  t = step

    One copy of θ as state. The derivative of √s at 0 is taken as 0, which is exact here: see
    `hypergrad.updates.formula.safe_sqrt`. Each of ``lr, lr_decay, eps, weight_decay`` is a
    `hypergrad.updates.Hyper`: a number, a function of the hyperparameters, or a `Schedule`, of one rate or of
    a tree of them.

    Raises:
        ArgumentError: for a number outside its range.
    """

    hypers: ClassVar[tuple[str, ...]] = ("lr", "lr_decay", "eps", "weight_decay")

    lr: Hyper = 1e-2
    lr_decay: Hyper = 0.0
    eps: Hyper = 1e-10
    weight_decay: Hyper = 0.0
    initial_accumulator: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator"):
            check_range("Adagrad", name, getattr(self, name), 0.0, float("inf"))

    def init(self, backend: Backend, params: Tree) -> Tree:
        return Total(backend.map(lambda zero: zero + self.initial_accumulator, backend.zeros(params)))

    def step(
        self, backend: Backend, rates: Any, gradient: Tree, opt_state: Tree, params: Tree, t: Any
    ) -> tuple[Tree, Tree]:
        if not is_off(self.weight_decay):
            gradient = backend.axpy(rates.weight_decay, params, gradient)
        square = backend.map(lambda s, g: s + g * g, opt_state.square, gradient)
        rate = rates.lr / (1 + clock(backend, t, params) * rates.lr_decay)

        def leaf(theta: Array, g: Array, s: Array) -> Array:
            return theta - fitted(backend, rate, theta) * g / (safe_sqrt(backend, s) + rates.eps)

        return backend.map(leaf, params, gradient, square), Total(square)
