"""The module in training: its steps, what is needed to take them again, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad.errors import ArgumentError, NonFiniteError, UnsupportedOpError
from hypergrad.estimators import Unrolled
from hypergrad.tuning import Recipe
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.module.checks import trained
from hypergrad_torch.module.losses import Objective
from hypergrad_torch.module.optimizer_step import Trainer
from hypergrad_torch.module.snapshot import Snapshot
from hypergrad_torch.module.window import Record, Window, read, write
from hypergrad_torch.randomness import Draws, generators


@final
class Training:
    """A module and its optimiser, and the steps of the present round.

    ``steps`` counts all training steps, and ``since`` those since λ was last updated. ``window`` holds those
    that an unroll is going to differentiate through, from the first of them on.
    """

    def __init__(
        self,
        backend: TorchBackend,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        recipe: Recipe,
        max_norm: float | None,
    ) -> None:
        self._backend, self._model, self._optimizer = backend, model, optimizer
        self._objective, self._recipe = objective, recipe
        self.trainer = Trainer(optimizer, trained(model, optimizer), max_norm)
        self.steps, self.since = 0, 0
        self.window: Window | None = None
        start = (Snapshot.take(self.trainer), objective.functional.buffers()) if recipe.restart else None
        self._start = start

    def refresh(self) -> bool:
        """Look again at what is trained: parameters may have been frozen, freed, added or hooked.

        Returns whether other parameters are trained now.

        Raises:
            ArgumentError: if they have changed within a window.
            UnsupportedOpError: for gradient hooks with micro-batches.
        """
        params = trained(self._model, self._optimizer)
        now, before = ({name: id(p) for name, p in held.items()} for held in (params, self.trainer.params))
        changed = now != before
        if changed:
            if self.window is not None:
                raise ArgumentError(
                    "ModuleTuner: the parameters that the optimizer trains have changed within the steps "
                    f"that {type(self._recipe.estimator).__name__} differentiates through"
                )
            self.trainer = replace(self.trainer, params=params)
        if self._objective.micro_batches > 1 and self.trainer.has_hooks:
            raise UnsupportedOpError(
                "gradient hooks of parameters are called for each micro-batch, and what they do together is "
                "not differentiated: use micro_batches=1, or change gradients in the loss"
            )
        return changed

    def record(self, batch: Any) -> Record:
        """What a step on this batch begins with."""
        functional = self._objective.functional
        return Record(batch, generators.state(), functional.buffers(), functional.modes(), self.trainer.now())

    def step(self, record: Record) -> tuple[Tensor, Record]:
        """The user's own step: its loss, and the record with the parameters that had a gradient.

        Raises:
            NonFiniteError: if the loss is not finite, as far as that can be read.
        """
        params = self.trainer.params
        value, gradients = self._objective.training_gradient(self._backend, record.batch, params)
        if self._backend.readable(value) and not torch.isfinite(value):
            raise NonFiniteError("T1", self.steps)
        self.trainer.step(gradients)
        self.steps += 1
        if not isinstance(self._recipe.estimator, Unrolled):
            return value, record
        used = [gradients[name] is not None for name in sorted(gradients)]
        return value, replace(record, taken=record.taken._replace(used=used))

    def window_from_here(self) -> Window | None:
        """The window, begun if the coming step is the first of an unroll."""
        begins = self.since == self._recipe.plain_steps and isinstance(self._recipe.estimator, Unrolled)
        return Window(Snapshot.take(self.trainer)) if begins else self.window

    @property
    def begins_again(self) -> bool:
        """Does the coming step go back to the start?"""
        return self._start is not None and self.since == self._recipe.plain_steps

    def begin_again(self) -> Snapshot:
        """Put parameters, buffers and the optimiser's state back to the start, and return it."""
        assert self._start is not None
        snapshot, buffers = self._start
        snapshot.restore()
        self._objective.functional.set_buffers(buffers)
        return snapshot

    @contextmanager
    def undone_on_failure(self, record: Record, everything: bool) -> Iterator[Snapshot | None]:
        """Put generators and buffers back if the block fails; with ``everything`` parameters and optimiser
        too.

        Yields these as they are, if they were copied. A step of training alone fails, if at all, before the
        optimiser has moved the parameters.
        """
        snapshot = Snapshot.take(self.trainer) if everything else None
        round_ = self.steps, self.since, self.window
        try:
            yield snapshot
        except BaseException:
            self.steps, self.since, self.window = round_
            generators.restore(record.draws)
            self._objective.functional.set_buffers(record.buffers)
            if snapshot is not None:
                snapshot.restore()
            raise

    # Saving.

    def write(self) -> dict[str, Any]:
        """Plain containers of tensors."""
        draws, start = generators.state(), self._start
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "draws": [draws.cpu, *draws.cuda],
            "steps": self.steps,
            "since": self.since,
            "window": None if self.window is None else write(self.window),
            "start": None if start is None else {"snapshot": start[0].write(), "buffers": start[1]},
        }

    def read(self, stored: dict[str, Any]) -> None:
        """Go on from what `write` returned."""
        window, start = stored["window"], stored["start"]
        self._model.load_state_dict(stored["model"])
        self._optimizer.load_state_dict(stored["optimizer"])
        cpu, *cuda = stored["draws"]
        generators.restore(Draws(cpu, tuple(cuda)))
        self.window = None if window is None else read(self.trainer, window)
        if self._start is not None:
            self._start = (Snapshot.read(self.trainer, start["snapshot"]), start["buffers"])
        self.steps, self.since = int(stored["steps"]), int(stored["since"])
