"""A module, its hyperparameters and its losses as functions of trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypergrad.backend import Tree
from hypergrad_torch.graph import trees
from hypergrad_torch.private import slots_of

Loss = Callable[..., Tensor]
"""(model, hparams, batch) -> scalar"""

Buffers = dict[str, Tensor]


@final
class Hyperparameters:
    """A tree of tensors and modules, and the tree of its tensors, in which a module is a dict of them."""

    def __init__(self, hparams: Tree) -> None:
        self.tree = hparams
        self._leaves, self._unflatten = trees.flatten(hparams)
        self.modules = nn.ModuleList([leaf for leaf in self._leaves if isinstance(leaf, nn.Module)])

    def tensors(self) -> Tree:
        """λ as estimators see it."""
        return self._unflatten(
            [dict(leaf.named_parameters()) if isinstance(leaf, nn.Module) else leaf for leaf in self._leaves]
        )

    def by_path(self, lam: Tree) -> dict[str, Any]:
        """The leaves of a tree like `tensors`, by their paths."""
        return dict(zip(trees.paths(lam, "hparams"), trees.flatten(lam)[0], strict=True))

    def state(self) -> dict[str, Tensor]:
        """All tensors that a run changes, by their paths: λ, and the buffers of its modules."""
        tree = self._unflatten(
            [leaf.state_dict() if isinstance(leaf, nn.Module) else leaf.detach() for leaf in self._leaves]
        )
        return self.by_path(tree)

    def assign(self, values: dict[str, Tensor]) -> None:
        """Write values, by path, into the tensors of λ."""
        with torch.no_grad():
            for path, tensor in self.by_path(self.tensors()).items():
                tensor.copy_(values[path])

    def pairs(self, lam: Tree) -> list[tuple[Any, Any]]:
        """Each tensor or module, with what stands in its place in λ."""
        pairs: list[tuple[Any, Any]] = []
        trees.map(lambda leaf, value: pairs.append((leaf, value)), self.tree, lam)
        return pairs

    def filled(self, lam: Tree) -> tuple[Tree, dict[str, Tensor]]:
        """The tree that the losses get for a λ, and the tensors to put into its modules."""
        values = [value for _, value in self.pairs(lam)]
        leaves, inside = list(values), dict[str, Tensor]()
        at = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, nn.Module)]
        for k, i in enumerate(at):
            leaves[i] = self._leaves[i]
            inside |= {f"hyper.{k}.{name}": tensor for name, tensor in values[i].items()}
        return self._unflatten(leaves), inside


@final
class _Call(nn.Module):
    """What `torch.func.functional_call` calls: a loss, with modules whose tensors have been exchanged."""

    def __init__(self, model: nn.Module, hyper: nn.ModuleList) -> None:
        super().__init__()
        self.model, self.hyper = model, hyper

    def forward(self, loss: Loss, hparams: Tree, batch: Any) -> Tensor:
        return loss(self.model, hparams, batch)


@final
class Functional:
    """Losses of a module in use, as functions of its parameters, hyperparameters and buffers.

    The module itself is unchanged: train/eval mode is restored, and buffers change in copies.
    """

    def __init__(self, model: nn.Module, hparams: Hyperparameters) -> None:
        self.model, self.hparams = model, hparams
        self._call = _Call(model, hparams.modules)

    def buffers(self) -> Buffers:
        """Return copies of all buffers."""
        return {name: buffer.detach().clone() for name, buffer in self._call.named_buffers()}

    def set_buffers(self, values: Buffers) -> None:
        """Give the buffers these values."""
        for name, buffer in self._call.named_buffers():
            buffer.copy_(values[name])

    def modes(self) -> list[bool]:
        """Train/eval mode of every module."""
        return [part.training for part in self._call.modules()]

    def __call__(
        self, loss: Loss, theta: dict[str, Tensor], lam: Tree, batch: Any, buffers: Buffers, modes: list[bool]
    ) -> Tensor:
        """The loss at these values. What it leaves in the buffers is in ``buffers`` afterwards."""
        hparams, inside = self.hparams.filled(lam)
        slots = self._slots()
        shared = {slots[id(leaf)][0]: value for leaf, value in self.hparams.pairs(lam) if id(leaf) in slots}
        tensors = {f"model.{name}": tensor for name, tensor in theta.items()} | shared | inside | buffers
        names = {aliases[0]: aliases for aliases in slots.values()}
        placed = {alias: tensor for name, tensor in tensors.items() for alias in names.get(name, [name])}
        with self.modes_kept():
            _set_modes(self._call, modes)
            value: Tensor = functional_call(self._call, placed, (loss, hparams, batch), tie_weights=False)
        buffers.update({name: placed[name] for name in buffers})
        return value

    def in_place(self, loss: Loss, batch: Any) -> Tensor:
        """The loss of the module as it stands, as in the user's own loop."""
        with self.modes_kept():
            return loss(self.model, self.hparams.tree, batch)

    @contextmanager
    def modes_kept(self) -> Iterator[None]:
        """Put train/eval mode of every module back after the block."""
        before = self.modes()
        try:
            yield
        finally:
            _set_modes(self._call, before)

    def _slots(self) -> dict[int, list[str]]:
        """For every tensor all the names under which modules hold it; a shared one is exchanged in all."""
        slots: dict[int, list[str]] = {}
        for path, part in self._call.named_modules():
            for held in slots_of(part):
                for key, tensor in held.items():
                    if tensor is not None:
                        slots.setdefault(id(tensor), []).append(f"{path}.{key}")
        return slots


def _set_modes(module: nn.Module, modes: list[bool]) -> None:
    for part, training in zip(module.modules(), modes, strict=True):
        if part.training is not training:
            part.training = training
