"""λ in place: its tensors, their free coordinates, and the state of its update rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from hypergrad.backend import Tree
from hypergrad.tuning import Recipe
from hypergrad.tuning.checkpoint import check_counters
from hypergrad.tuning.spaces import free_coordinates, spread
from hypergrad.updates import as_update_rule
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.graph import trees
from hypergrad_torch.module.checkpoint import check_like, check_optimizer, read_tree, write_tree
from hypergrad_torch.module.functional import Hyperparameters
from hypergrad_torch.module.optimizer_step import HyperOptimizer, copied
from hypergrad_torch.module.snapshot import Snapshot


class _Before(NamedTuple):
    """What an update of λ changes, as it was; ``optimizer`` if a torch optimiser updates λ."""

    values: dict[str, Tensor]
    optimizer: Snapshot | None
    free: Tree
    hyper_state: Tree
    constants: Tree
    updates: int


@final
class Tuned:
    """The hyperparameters of a module tuner. The user's tensors hold λ itself, in its own domain.

    ``values`` are constants: a tree of tensors like λ as the last update left it.
    """

    def __init__(self, backend: TorchBackend, hyper: Hyperparameters, recipe: Recipe) -> None:
        self._backend, self._hyper, self._recipe = backend, hyper, recipe
        rule = as_update_rule(recipe.hyper_update)
        self._in_place = rule if isinstance(rule, HyperOptimizer) else None
        self.values = trees.map(copied, hyper.tensors())
        self._spaces = spread(backend, recipe.space, self.values)
        self._free = recipe.free(backend, self.values)
        self._hyper_state = rule.init(backend, self._free)
        self.updates = 0
        self._before: _Before | None = None

    @contextmanager
    def undone_on_failure(self, updates: bool) -> Iterator[None]:
        """Put λ and all about it back if the block fails, in which there may be an update."""
        self._before = before = self._copies() if updates else None
        try:
            yield
        except BaseException:
            if before is not None:
                if before.optimizer is not None:
                    before.optimizer.restore()
                self._hyper.assign(before.values)
                self._free, self._hyper_state = before.free, before.hyper_state
                self.values, self.updates = before.constants, before.updates
            raise
        finally:
            self._before = None

    def update(self, hypergradient: Tree, allowed: Any) -> Any:
        """Update λ in its tensors, where ``allowed``. Returns how many entries were projected.

        Called inside of `undone_on_failure`.

        Raises:
            ArgumentError: if somebody has moved λ out of its space.
        """
        before, (_, unflatten) = self._before, trees.flatten(self.values)
        assert before is not None
        lam = unflatten(list(before.values.values()))
        free = free_coordinates(self._backend, self._spaces, before.free, lam)
        new = self._recipe.update_hparams(
            self._backend, free, before.hyper_state, hypergradient, self.updates, allowed
        )
        values = {
            path: self._choose(path, h, before.values[path], allowed)
            for path, h in self._hyper.by_path(new.hparams).items()
        }
        if isinstance(allowed, Tensor) and before.optimizer is not None:
            before.optimizer.restore_state_unless(allowed)
        self._hyper.assign(values)
        self._free, self._hyper_state = new.free, new.hyper_state
        self.values = unflatten(list(values.values()))
        self.updates += 1
        return new.clipped

    def _copies(self) -> _Before:
        tensors = self._hyper.by_path(self._hyper.tensors())
        optimizer = None if self._in_place is None else Snapshot.take(self._in_place.trainer)
        values = optimizer.params if optimizer else {path: copied(h) for path, h in tensors.items()}
        return _Before(values, optimizer, self._free, self._hyper_state, self.values, self.updates)

    def _choose(self, path: str, new: Tensor, old: Tensor, allowed: Any) -> Tensor:
        """The new value, unless the optimiser does not hold this tensor or the update is not allowed."""
        if self._in_place is not None and not self._in_place.holds(path):
            return old
        return torch.where(allowed, new, old) if isinstance(allowed, Tensor) else new

    # Saving.

    def write(self) -> dict[str, Any]:
        """Plain containers of tensors."""
        optimizer = self._optimizer
        return {
            "hparams": self._hyper.state(),
            "free": write_tree(self._free, "free"),
            "hyper_state": write_tree(self._hyper_state, "hyper_state"),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "updates": self.updates,
        }

    def read(self, stored: dict[str, Any]) -> Callable[[], None]:
        """Check what `write` returned, and return what goes on from there.

        Raises:
            CheckpointError: if it belongs to other hyperparameters, or to another update rule of them.
        """
        held, optimizer = self._hyper.state(), self._optimizer
        check_like(stored, self.write(), "tuned", beside=("optimizer", "free", "hyper_state"))
        free = read_tree(stored["free"], self._free, "free")
        hyper_state = read_tree(stored["hyper_state"], self._hyper_state, "hyper_state")
        check_counters({"tuned['updates']": stored["updates"]})
        if optimizer is not None:
            check_optimizer(stored["optimizer"], optimizer, "tuned['optimizer']")

        def go_on() -> None:
            if optimizer is not None:
                optimizer.load_state_dict(copy.deepcopy(stored["optimizer"]))  # which it keeps
            with torch.no_grad():
                for path, tensor in held.items():
                    tensor.copy_(stored["hparams"][path])
            self._free, self._hyper_state, self.updates = free, hyper_state, stored["updates"]
            self.values = trees.map(copied, self._hyper.tensors())

        return go_on

    @property
    def _optimizer(self) -> Optimizer | None:
        return None if self._in_place is None else self._in_place.trainer.optimizer
