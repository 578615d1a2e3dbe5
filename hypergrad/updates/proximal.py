"""Proximal steps: update maps for penalties without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Array, Backend, Tree, find_backend
from hypergrad.errors import ArgumentError
from hypergrad.updates.base import UpdateRule, Updates, as_update_rule


@final
@dataclass(frozen=True)
class Proximal(UpdateRule):
    r"""A step of another rule, then a proximal operator (Combettes and Wajs 2005, eq. 3.6).

        θ ← prox(θ − η ∇C̃1(θ, λ), λ)

    For penalties without a gradient, whose minimum is the fixed point of this map (Bertrand et al. 2020)::

        lasso = hg.Proximal(hg.SGD(eta), lambda p, h: hg.soft_threshold(p, eta * h["l1"]))
        problem = hg.FixedPoint.of_update(problem, lasso)  # for hg.Implicit(hg.GMRES())

    The scale of ``prox`` must match the learning rate of the rule. The step is differentiated like any other:
    the derivative of a parameter within the threshold is 0, so only the support contributes.

    Args:
        rule: an update rule.
        prox: (params, hparams) -> params.

    Raises:
        ArgumentError: if ``prox`` is not a function, or ``rule`` not an update rule.
    """

    rule: Updates
    prox: Callable[[Tree, Tree], Tree]

    def __post_init__(self) -> None:
        as_update_rule(self.rule)
        if not callable(self.prox):
            raise ArgumentError(
                f"Proximal: prox = {self.prox!r}; it must be a function (params, hparams) -> params"
            )

    def init(self, backend: Backend, params: Tree) -> Tree:
        return as_update_rule(self.rule).init(backend, params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        rule = as_update_rule(self.rule)
        params, opt_state = rule.update(backend, gradient, opt_state, params, hparams, step)
        return self.prox(params, hparams), opt_state


def soft_threshold(params: Tree, thresholds: Tree) -> Tree:
    """Apply the proximal operator of t‖θ‖₁: sign(θ) max(|θ| − t, 0), in any framework.

    Args:
        params: a tree of arrays.
        thresholds: t ≥ 0, a scalar for all or a tree like ``params``, of numbers or arrays.
    """
    backend = find_backend(params)
    xp, (leaves, unflatten) = backend.xp, backend.flatten(params)
    each = backend.flatten(thresholds)[0]
    if len(each) != len(leaves):
        each = each * len(leaves)

    def leaf(x: Array, t: Any) -> Array:
        # Two kinks instead of a sign: the derivative is 1 outside the threshold and 0 within it.
        return xp.where(x > t, x - t, xp.where(x < -t, x + t, xp.zeros_like(x)))

    return unflatten([leaf(x, t) for x, t in zip(leaves, each, strict=True)])
