"""A module and its losses as functions of trees, which is what a `Bilevel` problem is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor, nn
from torch.func import functional_call

from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad_torch.graph import holds_checkpoints, trees

Tree = Any
Loss = Callable[[nn.Module, Tree, Any], Tensor]
Buffers = dict[str, Tensor]

_WRAPPERS = {
    "OptimizedModule": (
        "a module compiled by torch.compile",
        "hand in the module itself, `compiled._orig_mod`, and the optimiser over its parameters",
    ),
    "DistributedDataParallel": (
        "a DistributedDataParallel module, whose gradients are averaged outside of the graph",
        "hand in `ddp.module`; average training gradients and hypergradients over the ranks yourself",
    ),
    "FullyShardedDataParallel": (
        "an FSDP module, which has no double backward",
        "hand in the module before it is sharded",
    ),
    "FSDPModule": (
        "an FSDP module, which has no double backward",
        "hand in the module before it is sharded",
    ),
}


def check_module(model: nn.Module) -> None:
    """Refuse wrappers around a module that derivatives do not pass through rightly.

    Raises:
        UnsupportedOpError: naming the wrapper and the way out.
        ArgumentError: if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; it is a torch.nn.Module")
    for part in model.modules():
        for base in type(part).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                what, remedy = _WRAPPERS[base.__name__]
                raise UnsupportedOpError(
                    explain(
                        f"the model is or holds {what}",
                        "Its second derivatives would be wrong or missing.",
                        (remedy,),
                    )
                )


@final
class Hyperparameters:
    """A tree of tensors and modules, and the tree of tensors in it: a module counts as a dict of them."""

    def __init__(self, hparams: Tree) -> None:
        self.tree = hparams
        self._leaves, self._unflatten = trees.flatten(hparams)
        self.modules = nn.ModuleList([leaf for leaf in self._leaves if isinstance(leaf, nn.Module)])

    def tensors(self) -> Tree:
        """λ, as estimators see it."""
        return self._unflatten(
            [dict(leaf.named_parameters()) if isinstance(leaf, nn.Module) else leaf for leaf in self._leaves]
        )

    def state(self) -> dict[str, Tensor]:
        """All tensors that a run changes, by their paths: λ, and the buffers of its modules."""
        tree = self._unflatten(
            [leaf.state_dict() if isinstance(leaf, nn.Module) else leaf.detach() for leaf in self._leaves]
        )
        return dict(zip(trees.paths(tree, "hparams"), trees.flatten(tree)[0], strict=True))

    def pairs(self, lam: Tree) -> list[tuple[Any, Any]]:
        """Each tensor or module with what stands in its place in λ."""
        found: list[tuple[Any, Any]] = []
        trees.map(lambda leaf, value: found.append((leaf, value)), self.tree, lam)
        return found

    def filled(self, lam: Tree) -> tuple[Tree, dict[str, Tensor]]:
        """The tree that the losses see, and the tensors to be put into its modules, for a λ."""
        values = [value for _, value in self.pairs(lam)]
        leaves, inside = list(values), dict[str, Tensor]()
        at = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, nn.Module)]
        for k, i in enumerate(at):
            leaves[i] = self._leaves[i]
            inside |= {f"hyper.{k}.{name}": tensor for name, tensor in values[i].items()}
        return self._unflatten(leaves), inside


@final
class _Call(nn.Module):
    """What `torch.func.functional_call` calls: a loss of modules whose tensors it has exchanged."""

    def __init__(self, model: nn.Module, hyper: nn.ModuleList) -> None:
        super().__init__()
        self.model, self.hyper = model, hyper

    def forward(self, loss: Loss, hparams: Tree, batch: Any) -> Tensor:
        return loss(self.model, hparams, batch)


@final
class Losses:
    """Losses of a module in use, evaluated as functions of its parameters, hyperparameters and buffers.

    The module itself is left as it is: train/eval mode is put back, and buffers move in copies.
    """

    def __init__(self, model: nn.Module, hparams: Hyperparameters) -> None:
        self.model, self.hparams = model, hparams
        self._call = _Call(model, hparams.modules)

    def buffers(self) -> Buffers:
        """Copies of all buffers, as they are now."""
        return {name: buffer.detach().clone() for name, buffer in self._call.named_buffers()}

    def set_buffers(self, values: Buffers) -> None:
        """Give the buffers themselves these values."""
        for name, buffer in self._call.named_buffers():
            buffer.copy_(values[name])

    def modes(self) -> list[bool]:
        """Train/eval mode of every module."""
        return [part.training for part in self._call.modules()]

    def __call__(
        self, loss: Loss, theta: dict[str, Tensor], lam: Tree, batch: Any, buffers: Buffers, modes: list[bool]
    ) -> Tensor:
        """The loss at these values; ``buffers`` hold afterwards what it left in them.

        Raises:
            UnsupportedOpError: if the loss holds checkpoints, which would be computed again later from
                whatever the module holds by then.
        """
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
        if isinstance(value, Tensor) and holds_checkpoints([value]):
            raise UnsupportedOpError(
                explain(
                    "the loss holds torch.utils.checkpoint, which runs its block again in the backward pass",
                    "By then the module holds other parameters, and the derivative would be theirs.",
                    (
                        "leave checkpoints out of the module for tuning",
                        "in the functional API, hand the block all that it uses as arguments",
                    ),
                )
            )
        return value

    def in_place(self, loss: Loss, batch: Any) -> Tensor:
        """The loss of the module as it stands, as the user's own loop has it."""
        with self.modes_kept():
            return loss(self.model, self.hparams.tree, batch)

    @contextmanager
    def modes_kept(self) -> Iterator[None]:
        """Put train/eval mode of every module back."""
        found = self.modes()
        try:
            yield
        finally:
            _set_modes(self._call, found)

    def _slots(self) -> dict[int, list[str]]:
        """For every tensor all the names under which modules hold it: a shared one moves in all of them."""
        slots: dict[int, list[str]] = {}
        for path, part in self._call.named_modules():
            for key, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None:
                    slots.setdefault(id(tensor), []).append(f"{path}.{key}")
        return slots


def _set_modes(module: nn.Module, modes: list[bool]) -> None:
    for part, training in zip(module.modules(), modes, strict=True):
        if part.training is not training:
            part.training = training


# Operations whose gradient torch computes by another formula, equal up to rounding, if it keeps a graph.
_TWO_FORMULAS = {"SiluBackward0", "MishBackward0", "NativeGroupNormBackward0", "WeightNormInterfaceBackward0"}


def has_two_formulas(nodes: Iterable[Any]) -> bool:
    """Would a gradient through these nodes be other bits with a graph than without?"""
    return any(node.name() in _TWO_FORMULAS for node in nodes)
