"""Saving a run of a module: as plain containers of tensors, and as a file of arrays."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hypergrad.backend import Tree
from hypergrad.errors import CheckpointError
from hypergrad.tuning import History, Recipe, folder
from hypergrad.tuning.checkpoint import check_head, head_of, leaves_of
from hypergrad.tuning.files import Head, read_arrays, write_arrays
from hypergrad.tuning.interrupts import Interrupts
from hypergrad.tuning.recorder import Recorder
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.module.checkpoint import (
    check_kind,
    check_like,
    read_history,
    read_tree,
    write_history,
    write_tree,
)
from hypergrad_torch.module.hyper import Tuned
from hypergrad_torch.module.plain import from_file, to_file
from hypergrad_torch.module.training import Training

_PARTS = ("head", "training", "tuned", "memory", "history")
"""What a state consists of."""


class Saving(ABC):
    """The saving of a `ModuleTuner`, apart from its steps."""

    model: nn.Module
    recipe: Recipe
    _backend: TorchBackend
    _training: Training
    _tuned: Tuned
    _memory: Tree
    _recorder: Recorder
    _unread: list[Any]
    _interrupts: Interrupts
    _described: dict[str, Any]
    """The arguments of the tuner that a saved run must share."""

    @property
    @abstractmethod
    def history(self) -> History:
        """Losses, hyperparameters and reports until now."""

    @abstractmethod
    def _raise_fault(self, wait: bool) -> None:
        """Raise the first fault of earlier updates, if ``wait`` also one that must be waited for."""

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit: module, optimisers, λ, generators, clocks, history.

        Plain containers of tensors, which ``torch.load(..., weights_only=True)`` reads.

        Raises:
            As `check`, for an update whose fault could not be read yet.
        """
        self._interrupts.check()
        self._raise_fault(wait=True)
        return {
            "head": self._head(),
            "training": self._training.write(),
            "tuned": self._tuned.write(),
            "memory": write_tree(self._memory, "memory"),
            "history": write_history(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            CheckpointError: if it belongs to another module, optimiser or recipe, with all differences; if no
                run has such a state. Everything is then as it was.
        """
        with self._interrupts:
            before = None if self._interrupts.torn else copy.deepcopy(self.state_dict())
            go_on = self._read(state)
            try:
                go_on()
            except BaseException as error:
                if before is not None:
                    self._read(before)()
                if isinstance(error, Exception):
                    raise CheckpointError(f"the module or an optimiser refuses its state: {error}") from error
                raise
            self._interrupts.torn = False

    def save(self, path: str | Path, *, keep: int | None = None) -> None:
        """Write what `state_dict` returns to one ``.npz`` file. If that fails, an older file is unchanged.

        Args:
            path: a file; with ``keep`` a folder, in which the file is numbered by the training step.
            keep: how many files to keep in the folder, the newest ones.

        Raises:
            OSError: if the file cannot be written.
            CheckpointError: if the folder has checkpoints of later steps; if a batch that an unroll will use
                again is of a class that is not plain.
            As `check`, for an update whose fault could not be read yet.
        """
        saved = to_file(self.state_dict())
        folder.save(path, keep, self._training.steps, lambda file: write_arrays(file, *saved))

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            CheckpointError: as `load_state_dict`; if the file is damaged.
            FileNotFoundError: if it does not exist.
        """
        head = self._head()
        self.load_state_dict(from_file(read_arrays(path, lambda found: check_head(found, head, str(path)))))

    def load_latest(self, path: str | Path) -> None:
        """Go on from the newest file of a folder to which ``save(..., keep=...)`` wrote.

        Raises:
            As `load`; CheckpointError if all files of the folder are damaged.

        Warns:
            CheckpointWarning: for a damaged file, in place of which an older one is read.
        """
        folder.load_latest(path, self.load)

    def _head(self) -> Head:
        model = {name: x for name, x in self.model.state_dict().items() if isinstance(x, torch.Tensor)}
        leaves = leaves_of(self._backend, "model", model)
        leaves |= leaves_of(self._backend, "hparams", self._tuned.values)
        return head_of("module", self._backend, self._described, leaves)

    def _read(self, state: dict[str, Any]) -> Callable[[], None]:
        """Check a state, and return what goes on from there."""
        check_kind(state, dict, "the state")
        check_head(state.get("head"), self._head(), "the state")
        check_like(dict.fromkeys(state), dict.fromkeys(_PARTS), "the state")
        history, memory = read_history(state["history"]), read_tree(state["memory"], self._memory, "memory")
        history.check_continues(self.history)
        tuned, training = self._tuned.read(state["tuned"]), self._training.read(state["training"])
        counts = len(history.inner_values), len(history.steps) - 1
        if counts != (state["training"]["steps"], state["tuned"]["updates"]):
            raise CheckpointError(f"the history is one of {counts[0]} steps and {counts[1]} updates")

        def go_on() -> None:
            tuned()
            training()
            self._memory, self._unread = memory, []
            self._recorder = Recorder(self.recipe, self._backend, self._tuned.values, history)

        return go_on
