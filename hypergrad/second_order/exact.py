"""Exact products, by pulling back through the graph of the training gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Backend, Tree
from hypergrad.problems.base import Problem
from hypergrad.problems.condition import Condition, Spent
from hypergrad.problems.derivatives import Derivatives
from hypergrad.problems.step import Inner, Observation, Training, inner_gradient, observe
from hypergrad.second_order.base import Products
from hypergrad.second_order.step import Gradient, PulledBack, Step, step_with_mixed_term


@final
@dataclass(frozen=True)
class Exact(Products):
    r"""(∂²C̃1) p as the derivative of the training gradient, reverse over reverse.

        p ↦ ∂⟨∇_θ C̃1, p⟩ / ∂(θ, λ)

    The graph of the gradient is built once and kept, and each product is one pull-back through it: about
    two gradients. Where λ enters through a penalty alone, the product with ∂²_λθ C̃1 does not touch
    the data. For a `Derivatives` problem these are the user's own products.
    """

    def of(
        self, backend: Backend, problem: Problem, z: Inner, hparams: Tree, batches: list[Tree]
    ) -> Condition:
        return problem.condition(backend, z.params, hparams, batches, z.aux)

    def step(
        self, training: Training, z: Inner, hparams: Tree, batch: Tree, t: Any, through_update: bool
    ) -> Step:
        backend, problem = training.backend, training.problem
        if isinstance(problem, Derivatives):
            return _step_by_hand(training, problem, z, hparams, batch, t, through_update)

        def step(hparams: Tree) -> tuple[Tree, tuple[Inner, Observation]]:
            new, observed = training.step(z, hparams, batch, t)
            return new.params, (new._replace(params=None), observed)

        def gradient(hparams: Tree) -> tuple[Tree, tuple[Tree, Observation]]:
            value, gradient, aux = inner_gradient(backend, problem, z, hparams, batch)
            return gradient, (aux, observe(backend, value, gradient, None, t))

        # The mixed term pulls back through the graph of the training gradient: nothing is computed twice.
        if through_update:
            params, pullback, (rest, observed) = backend.vjp(step, hparams)
            new = rest._replace(params=params)
        else:
            g, pullback, (aux, observed) = backend.vjp(gradient, hparams)
            new = training.apply(g, z, hparams, t)._replace(aux=aux)

        def pull(v: Tree) -> PulledBack:
            (term,) = pullback(v)
            return PulledBack(term, pullback.reached[0], Spent(2, 1, pullback.nbytes))

        return Step(new, observed, pull)


def _step_by_hand(
    training: Training,
    problem: Derivatives,
    z: Inner,
    hparams: Tree,
    batch: Tree,
    t: Any,
    through_update: bool,
) -> Step:
    """Take a step with the user's own mixed product, and pull back through the optimiser."""
    backend = training.backend
    _, product = problem.products(backend, z.params, hparams, batch)

    def mixed(u: Tree) -> PulledBack:
        return PulledBack(product(u), backend.map(lambda _: True, hparams), Spent(2, 1))

    at = Gradient(*inner_gradient(backend, problem, z, hparams, batch))
    return step_with_mixed_term(training, z, hparams, t, through_update, at, mixed)
