"""Adam and AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.backend import Array, Backend, Scalar, Tree
from hypergrad.updates.base import Hyper, UpdateRule, check_range, clock, is_off, resolve, safe_sqrt


class Moments(NamedTuple):
    """Running means of the gradient and of its square; with AMSGrad also the largest mean of the square."""

    mean: Tree
    square: Tree
    largest: Tree = ()


@final
@dataclass(frozen=True)
class Adam(UpdateRule):
    r"""Adam (Kingma and Ba 2015, algorithm 1), as ``torch.optim.Adam``.

        g ← ∇C̃1 + w θ                         w: weight_decay, here an L2 penalty
        m ← β1 m + (1 − β1) g
        s ← β2 s + (1 − β2) g²
        θ ← θ − η m̂ / (√ŝ + ε)                m̂ = m / (1 − β1ᵗ),  ŝ = s / (1 − β2ᵗ),  t = step + 1

    With ``amsgrad`` (Reddi et al. 2018) the largest s so far is used instead. Two copies of θ as state,
    three with AMSGrad. The derivative of √s at 0 is taken as 0, which is exact here:
    see `hypergrad.updates.base.safe_sqrt`. Each of ``lr, beta1, beta2, eps, weight_decay`` is a number,
    a function of the hyperparameters, or a `Schedule`.

    Raises:
        ArgumentError: for a number outside its range.
    """

    leafwise: ClassVar[bool] = True
    connected = True

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

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        if not is_off(self.weight_decay):
            decay = resolve(backend, "weight_decay", self.weight_decay, hparams, step)
            gradient = backend.axpy(decay, params, gradient)
        return _adam(self, backend, gradient, opt_state, params, hparams, step)


@final
@dataclass(frozen=True)
class AdamW(UpdateRule):
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019), as ``torch.optim.AdamW``.

        θ ← (1 − η w) θ, then the step of `Adam` without a penalty

    State, arguments and errors as for `Adam`.
    """

    leafwise: ClassVar[bool] = True
    connected = True

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

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        if not is_off(self.weight_decay):
            lr = resolve(backend, "lr", self.lr, hparams, step)
            decay = resolve(backend, "weight_decay", self.weight_decay, hparams, step)
            params = backend.axpy(-lr * decay, params, params)
        return _adam(self, backend, gradient, opt_state, params, hparams, step)


def _start(adam: Adam | AdamW, backend: Backend, params: Tree) -> Moments:
    zeros = backend.zeros(params)
    return Moments(zeros, zeros, zeros if adam.amsgrad else ())


def _check(rule: str, adam: Adam | AdamW) -> None:
    for name in ("lr", "eps", "weight_decay"):
        check_range(rule, name, getattr(adam, name), 0.0, float("inf"))
    for name in ("beta1", "beta2"):
        check_range(rule, name, getattr(adam, name), 0.0, 1.0)


def _adam(
    adam: Adam | AdamW,
    backend: Backend,
    gradient: Tree,
    moments: Moments,
    params: Tree,
    hparams: Tree,
    step: Any,
) -> tuple[Tree, Moments]:
    lr, beta1, beta2, eps = (
        resolve(backend, name, getattr(adam, name), hparams, step) for name in ("lr", "beta1", "beta2", "eps")
    )
    mean = backend.map(lambda m, g: beta1 * m + (1 - beta1) * g, moments.mean, gradient)
    square = backend.map(lambda s, g: beta2 * s + (1 - beta2) * g * g, moments.square, gradient)
    largest = backend.map(backend.xp.maximum, moments.largest, square) if adam.amsgrad else moments.largest
    t = clock(backend, step, params) + 1
    correction1, correction2 = _correction(backend, beta1, t), _correction(backend, beta2, t)

    def leaf(theta: Array, m: Array, s: Array) -> Array:
        return theta - lr * (m / correction1) / (safe_sqrt(backend, s / correction2) + eps)

    scale = largest if adam.amsgrad else square
    return backend.map(leaf, params, mean, scale), Moments(mean, square, largest)


def _correction(backend: Backend, beta: Scalar, t: Any) -> Scalar:
    """Return 1 − βᵗ; for a traced t without cancellation, which would cost half of float32's digits."""
    if isinstance(beta, float) and beta > 0 and not isinstance(t, int):
        return -backend.xp.expm1(t * math.log(beta))
    return 1 - beta**t
