"""A training step, and how a cotangent of θ_{t+1} is pulled back to λ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad.backend import Pullback, Scalar, Tree, vectors
from hypergrad.problems.condition import Spent
from hypergrad.problems.step import Inner, Observation, Training, observe


class PulledBack(NamedTuple):
    """A cotangent of θ_{t+1} pulled back to λ, and which hyperparameters it reaches, as the graph shows."""

    hparams: Tree
    reached: Tree
    spent: Spent
    error: Scalar | None = None
    """Estimated relative error of the mixed term, if it is a finite difference."""


class Step(NamedTuple):
    """A finished training step: z_{t+1}, the observation, and v -> `PulledBack`."""

    z: Inner
    observed: Observation
    pull: Callable[[Tree], PulledBack]


class Gradient(NamedTuple):
    """C̃1, its gradient, and the next auxiliary state."""

    value: Scalar
    g: Tree
    aux: Tree


def step_with_mixed_term(
    training: Training,
    z: Inner,
    hparams: Tree,
    t: Any,
    through_update: bool,
    at: Gradient,
    mixed: Callable[[Tree], PulledBack],
) -> Step:
    """Take a step whose mixed term u -> (∂²_λθ C̃1)ᵀ u is given, and pull back through the optimiser alone."""
    backend = training.backend
    update: Pullback | None = None
    if through_update:

        def apply(gradient: Tree, hparams: Tree) -> tuple[Tree, Tree]:
            new = training.apply(gradient, z, hparams, t)
            return new.params, new.opt_state

        params, update, opt_state = backend.vjp(apply, at.g, hparams)
        new = Inner(params, opt_state, at.aux)
    else:
        new = training.apply(at.g, z, hparams, t)._replace(aux=at.aux)

    def pull(v: Tree) -> PulledBack:
        if update is None:
            return mixed(v)
        u, direct = update(v)
        pulled = mixed(u)
        return pulled._replace(
            hparams=vectors.add(backend, direct, pulled.hparams),
            reached=backend.map(lambda a, b: a or b, pulled.reached, update.reached[1]),
        )

    return Step(new, observe(backend, at.value, at.g, new.params, t), pull)
