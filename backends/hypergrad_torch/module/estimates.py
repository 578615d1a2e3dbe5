"""Estimates for a module in use, and how each takes its training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch

from hypergrad.backend import Tree, vectors
from hypergrad.errors import ReplayError
from hypergrad.estimators import Estimate, Greedy, HypergradientEstimator, State
from hypergrad.updates import UpdateRule
from hypergrad_torch.autocast import precision
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.graph import trees
from hypergrad_torch.module.losses import Objective, Pass
from hypergrad_torch.module.optimizer_step import Hooked, RealStep
from hypergrad_torch.module.snapshot import Snapshot
from hypergrad_torch.module.training import Training
from hypergrad_torch.module.window import Record, Window
from hypergrad_torch.randomness import generators


@final
@dataclass(frozen=True, eq=False)
class Estimates:
    """The estimates of a module tuner, at the λ that its tensors hold now."""

    backend: TorchBackend
    objective: Objective
    training: Training

    def of_the_step(self, greedy: Greedy, record: Record, val: Any, start: Snapshot) -> Estimate[Any]:
        """T1−T2 of a training step, which is taken here on the module itself; ``start`` is a copy of it."""
        trainer = self.training.trainer
        losses = Pass(self.objective, trainer, trains=True)
        with start.in_force():
            rule, opt_state = self._formula(greedy, record)
        update = RealStep(trainer, trainer, rule, losses.plain)
        state = State(start.params, opt_state, self.training.steps)
        out = self._estimate(replace(greedy, update=update), losses, state, lambda t: record, val)
        self.objective.functional.set_buffers(losses.buffers)
        generators.restore(losses.draws)
        self.training.steps += 1
        return out

    def of_a_step_on_copies(self, greedy: Greedy, record: Record, val: Any) -> Estimate[Any]:
        """Estimate T1−T2 for the next training step; the module and its optimiser are unchanged."""
        trainer = self.training.trainer
        losses = Pass(self.objective, trainer, trains=True)
        rule, opt_state = self._formula(greedy, record)
        update = RealStep(trainer, trainer.twin(), rule, losses.plain)
        state = State(trainer.values(), opt_state, self.training.steps)
        return self._estimate(replace(greedy, update=update), losses, state, lambda t: record, val)

    def where_it_stands(
        self, estimator: HypergradientEstimator, record: Record, val: Any, memory: Tree
    ) -> Estimate[Any]:
        """An estimate that takes no training step."""
        losses = Pass(self.objective, self.training.trainer, trains=False)
        state = State(self.training.trainer.values(), None, self.training.steps, memory)
        return self._estimate(estimator, losses, state, lambda t: record, val)

    def of_a_window(self, estimator: HypergradientEstimator, window: Window, val: Any) -> Estimate[Any]:
        """Unroll the recorded training steps: they are replayed on copies.

        Raises:
            ReplayError: if that ends elsewhere than training did.
        """
        trainer, first = self.training.trainer, self.training.steps - len(window.records)
        losses = Pass(self.objective, trainer, trains=False)
        with window.start.in_force():
            rule, opt_state = trainer.formula(first, [record.taken for record in window.records])
        unrolled: Any = replace(estimator, update=Hooked(trainer, rule))  # type: ignore[call-arg]
        state = State(window.start.params, opt_state, first)
        out = self._estimate(unrolled, losses, state, lambda t: window.records[t - first], val)

        def values(theta: Tree) -> list[float]:
            """C̃1 of the last step and C2 at some parameters."""
            lam, problem = self._lam(), losses.problem
            with generators.replay(generators.state()), torch.no_grad():
                inner = problem.loss_on(self.backend, window.records[-1], None)(theta, lam)[0]
                return [float(inner), float(problem.validation_loss(theta, lam, val, None))]

        self._check_replay(window.start.params, out.state.params, trainer.values(), values)
        return out

    def _formula(self, greedy: Greedy, record: Record) -> tuple[UpdateRule | None, Tree]:
        """Return the optimiser's step as an update rule, and its state, if an estimator differentiates it."""
        if greedy.response == "gradient":
            return None, ()
        return self.training.trainer.formula(self.training.steps, [record.taken])

    def _estimate(
        self, estimator: Any, losses: Pass, state: State, train: Callable[[int], Record], val: Any
    ) -> Estimate[Any]:
        out: Estimate[Any] = estimator.estimate(
            losses.problem, state, self._lam(), train, lambda t: val, backend=self.backend
        )
        return out

    def _lam(self) -> Tree:
        return trees.map(lambda h: h.detach(), self.objective.functional.hparams.tensors())

    def _check_replay(self, start: Tree, end: Tree, now: Tree, values: Callable[[Tree], list[float]]) -> None:
        """Check that the replayed steps end where training is, if the values can be read.

        Adam magnifies gradients that are nothing but rounding, such as that of a bias before BatchNorm. So
        parameters may differ if the ``values`` of the losses do not.
        """
        backend = self.backend

        def distance(x: Tree, y: Tree) -> Any:
            return vectors.norm(backend, vectors.subtract(backend, x, y))

        apart, way = distance(end, now), distance(now, start)
        if not backend.readable(apart):
            return
        eps = precision(apart.dtype)
        if apart > eps**0.5 * way + 100 * eps * vectors.norm(backend, now):
            if np.allclose(values(end), values(now), rtol=eps**0.5, atol=0.0):
                return
            raise ReplayError(
                f"replayed training steps ended {float(apart):.1e} away from where they ended before, "
                f"having gone {float(way):.1e}"
            )
