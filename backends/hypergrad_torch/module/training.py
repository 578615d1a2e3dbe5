"""A module in training: its steps, what is needed to replay them, and how they are undone on failure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad.errors import ArgumentError, CheckpointError, NonFiniteError, UnsupportedOpError
from hypergrad.estimators import Unrolled
from hypergrad.tuning import Recipe
from hypergrad.tuning.checkpoint import check_counters
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.module.checkpoint import (
    check_kind,
    check_like,
    check_optimizer,
    read_draws,
    write_draws,
)
from hypergrad_torch.module.checks import trained
from hypergrad_torch.module.losses import Objective
from hypergrad_torch.module.optimizer_step import LearnedOptions, Trainer
from hypergrad_torch.module.snapshot import Snapshot
from hypergrad_torch.module.window import Record, Window, read, write
from hypergrad_torch.randomness import generators


@final
class Training:
    """A module and its optimiser, and the training steps since the last update of λ.

    ``steps`` counts all training steps, and ``since`` those since λ was last updated. ``window`` records
    those that an unroll will differentiate through.
    """

    def __init__(
        self,
        backend: TorchBackend,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        recipe: Recipe,
        max_norm: float | None,
        learned: LearnedOptions | None,
    ) -> None:
        self._backend, self._model, self._optimizer = backend, model, optimizer
        self._objective, self._recipe = objective, recipe
        self.trainer = Trainer(optimizer, trained(model, optimizer), max_norm, learned)
        self.steps, self.since = 0, 0
        self.window: Window | None = None
        start = (Snapshot.take(self.trainer), objective.functional.buffers()) if recipe.restart else None
        self._start = start

    def refresh(self) -> bool:
        """Read again which parameters are trained: some may have been frozen, freed, added or hooked.

        Returns whether they have changed.

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
        """Return the state from which a step on this batch starts."""
        functional = self._objective.functional
        return Record(batch, generators.state(), functional.buffers(), functional.modes(), self.trainer.now())

    def step(self, record: Record) -> tuple[Tensor, Record]:
        """Take the user's own step. Returns its loss, and the record with the parameters that had a gradient.

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
        """Return the window, a new one if the next step is the first of an unroll."""
        begins = self.since == self._recipe.plain_steps and isinstance(self._recipe.estimator, Unrolled)
        return Window(Snapshot.take(self.trainer)) if begins else self.window

    @property
    def begins_again(self) -> bool:
        """Does the next step restart from the initial state?"""
        return self._start is not None and self.since == self._recipe.plain_steps

    def begin_again(self) -> Snapshot:
        """Restore the initial parameters, buffers and optimiser state, and return their snapshot."""
        assert self._start is not None
        snapshot, buffers = self._start
        snapshot.restore()
        self._objective.functional.set_buffers(buffers)
        return snapshot

    @contextmanager
    def undone_on_failure(self, record: Record, everything: bool) -> Iterator[Snapshot | None]:
        """Restore generators and buffers if the block fails; with ``everything`` also parameters and
        optimiser.

        Yields a snapshot of the latter, if one was taken. A training step alone can only fail before the
        optimiser has updated the parameters.
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
            "draws": write_draws(draws),
            "steps": self.steps,
            "since": self.since,
            "window": None if self.window is None else write(self.window),
            "start": None if start is None else {"snapshot": start[0].write(), "buffers": start[1]},
        }

    def read(self, stored: dict[str, Any]) -> Callable[[], None]:
        """Check what `write` returned, and return what goes on from there.

        Raises:
            CheckpointError: if it belongs to another module, optimiser or recipe.
        """
        check_like(
            stored, self.write(), "training", beside=("model", "optimizer", "draws", "window", "start")
        )
        # Beside its tensors a module may save objects of its own, which it checks itself.
        check_like(stored["model"], self._model.state_dict(), "training['model']", beside=("_extra_state",))
        check_optimizer(stored["optimizer"], self._optimizer, "training['optimizer']")
        draws = read_draws(stored["draws"], "training['draws']")
        steps, since = stored["steps"], stored["since"]
        check_counters({"training['steps']": steps, "training['since']": since})
        if not since <= min(steps, self._recipe.period - 1):
            raise CheckpointError(
                f"training['since'] is {since}: an update is due every {self._recipe.period} steps, and "
                f"{steps} were taken"
            )
        unrolled = max(since - self._recipe.plain_steps, 0) * isinstance(self._recipe.estimator, Unrolled)
        window = stored["window"]
        if (window is not None) != (unrolled > 0):
            raise CheckpointError(f"training['window'] must hold {unrolled} steps")
        window = read(self.trainer, window, self.record(None), unrolled) if unrolled else None
        start = stored["start"]
        check_kind(start, type(None) if self._start is None else dict, "training['start']")
        if self._start is not None:
            check_like(start.get("buffers"), self._start[1], "training['start']['buffers']")
            start = (Snapshot.read(self.trainer, start.get("snapshot")), start["buffers"])

        def go_on() -> None:
            self._model.load_state_dict(stored["model"])
            self._optimizer.load_state_dict(copy.deepcopy(stored["optimizer"]))  # which it keeps
            if self.trainer.learned is not None:
                self.trainer.learned.forget()
            generators.restore(draws)
            self.window, self._start, self.steps, self.since = window, start, steps, since

        return go_on
