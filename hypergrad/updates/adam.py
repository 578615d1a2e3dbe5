"""Adam and AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Array, Backend, Scalar, Tree
from hypergrad.updates.formula import Formula, Hyper, check_range, clock, fitted, is_off, safe_sqrt


class Moments(NamedTuple):
    """Running means of the gradient and of its square; with AMSGrad also the largest mean of the square."""

    mean: Tree
    square: Tree
    largest: Tree = ()


@final
@dataclass(frozen=True)
class Adam(Formula):
    r"""Adam (Kingma and Ba 2015, algorithm 1), as ``torch.optim.Adam``.

        g ← ∇C̃1 + w θ                         w: weight_decay, here an L2 penalty
        m ← β1 m + (1 − β1) g
        s ← β2 s + (1 − β2) g²
        θ ← θ − η m̂ / (√ŝ + ε)                m̂ = m / (1 − β1ᵗ),  ŝ = s / (1 − β2ᵗ),  t = step + 1

    With ``amsgrad`` (Reddi et al. 2018) the largest s so far is used instead. Two copies of θ as state,
    three with AMSGrad. The derivative of √s at 0 is taken as 0, which is exact here:
    see `hypergrad.updates.formula.safe_sqrt`. Each of ``lr, beta1, beta2, eps, weight_decay`` is a
    `hypergrad.updates.Hyper`: a number, a function of the hyperparameters, or a `Schedule`, of one rate or of
    a tree of them.

    Raises:
        ArgumentError: for a number outside its range.
    """

    hypers: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2", "eps", "weight_decay")

    lr: Hyper = 1e-3
    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check("Adam", self)

    def init(self, backend: Backend, params: Tree) -> Tree:
        return _start(self, backend, params)

    def step(
        self, backend: Backend, rates: Any, gradient: Tree, opt_state: Tree, params: Tree, t: Any
    ) -> tuple[Tree, Tree]:
        if not is_off(self.weight_decay):
            gradient = backend.axpy(rates.weight_decay, params, gradient)
        return _adam(self.amsgrad, backend, rates, gradient, opt_state, params, t)


@final
@dataclass(frozen=True)
class AdamW(Formula):
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019), as ``torch.optim.AdamW``.

        θ ← (1 − η w) θ, then the step of `Adam` without a penalty

    State, arguments and errors as for `Adam`.
    """

    hypers: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2", "eps", "weight_decay")

    lr: Hyper = 1e-3
    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8
    weight_decay: Hyper = 1e-2
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check("AdamW", self)

    def init(self, backend: Backend, params: Tree) -> Tree:
        return _start(self, backend, params)

    def step(
        self, backend: Backend, rates: Any, gradient: Tree, opt_state: Tree, params: Tree, t: Any
    ) -> tuple[Tree, Tree]:
        if not is_off(self.weight_decay):
            params = backend.axpy(-rates.lr * rates.weight_decay, params, params)
        return _adam(self.amsgrad, backend, rates, gradient, opt_state, params, t)


def _start(adam: Adam | AdamW, backend: Backend, params: Tree) -> Moments:
    zeros = backend.zeros(params)
    return Moments(zeros, zeros, zeros if adam.amsgrad else ())


def _check(rule: str, adam: Adam | AdamW) -> None:
    for name in ("lr", "eps", "weight_decay"):
        check_range(rule, name, getattr(adam, name), 0.0, float("inf"))
    for name in ("beta1", "beta2"):
        check_range(rule, name, getattr(adam, name), 0.0, 1.0)


def _adam(
    amsgrad: bool, backend: Backend, rates: Any, gradient: Tree, moments: Moments, params: Tree, t: Any
) -> tuple[Tree, Moments]:
    beta1, beta2 = rates.beta1, rates.beta2
    mean = backend.map(lambda m, g: beta1 * m + (1 - beta1) * g, moments.mean, gradient)
    square = backend.map(lambda s, g: beta2 * s + (1 - beta2) * g * g, moments.square, gradient)
    largest = backend.map(backend.xp.maximum, moments.largest, square) if amsgrad else moments.largest
    count = clock(backend, t, params) + 1
    correction1, correction2 = _correction(backend, beta1, count), _correction(backend, beta2, count)

    def leaf(theta: Array, m: Array, s: Array) -> Array:
        first, second = fitted(backend, correction1, theta), fitted(backend, correction2, theta)
        return theta - rates.lr * (m / first) / (safe_sqrt(backend, s / second) + rates.eps)

    scale = largest if amsgrad else square
    return backend.map(leaf, params, mean, scale), Moments(mean, square, largest)


def _correction(backend: Backend, beta: Scalar, t: Any) -> Scalar:
    """Return 1 − βᵗ; for a traced t without cancellation, which would cost half of float32's digits."""
    if isinstance(beta, float) and beta > 0 and not isinstance(t, int):
        return -backend.xp.expm1(t * math.log(beta))
    return 1 - beta**t
