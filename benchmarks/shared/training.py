"""Training with the hyperparameters fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypergrad as hg
from hypergrad.backend import Backend, Tree
from hypergrad.problems.step import Inner, Training
from hypergrad.tapes import Trajectory
from hypergrad.updates import UpdateRule


def trained(
    backend: Backend,
    problem: hg.Bilevel,
    rule: UpdateRule,
    params: Tree,
    hparams: Tree,
    batch: Callable[[Any], Tree],
    steps: int,
) -> Tree:
    """θ after so many steps, where ``batch`` is that of a step."""
    path = Trajectory(Training(backend, problem, rule), batch, 0, steps)
    return path.run(Inner(params, rule.init(backend, params)), hparams)[0].params


def compiled(
    backend: Backend, problem: hg.Bilevel, rule: UpdateRule, steps: int
) -> Callable[[Tree, Tree, Tree], Tree]:
    """A program of θ_0, λ and the batches of all steps, stacked."""

    def train(params: Tree, hparams: Tree, batches: Tree) -> Tree:
        return trained(backend, problem, rule, params, hparams, lambda k: backend.take(batches, k), steps)

    return backend.compile(train)
