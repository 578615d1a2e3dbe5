"""Activation checkpoints: blocks that run again in the backward pass, with the tensors of the forward one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import final

from torch import Tensor, nn

from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad_torch.captured import reads_module
from hypergrad_torch.private import Node, Slots, recomputation, slots_of

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


@final
class Reentered(AbstractContextManager[None]):
    """Inside this block a module holds the tensors that it held when this object was made.

    Buffers are copies, so that a block that runs again does not update them again.
    """

    def __init__(self, module: nn.Module) -> None:
        self._held: list[tuple[Slots, str, Tensor, int]] = [
            (slots, key, tensor, is_buffer)
            for part in module.modules()
            for is_buffer, slots in enumerate(slots_of(part))
            for key, tensor in slots.items()
            if tensor is not None
        ]
        self._before: list[Tensor | None] = []

    def __enter__(self) -> None:
        self._before = [slots[key] for slots, key, *_ in self._held]
        for slots, key, tensor, is_buffer in self._held:
            slots[key] = tensor.detach().clone() if is_buffer else tensor

    def __exit__(self, *error: object) -> None:
        for (slots, key, *_), tensor in zip(self._held, self._before, strict=True):
            slots[key] = tensor
        self._before = []


def checkpoint_context(module: nn.Module) -> Callable[[], Contexts]:
    """Return a ``context_fn`` for ``torch.utils.checkpoint``, with which estimates are right.

    In the backward pass a checkpointed block runs again. By then the module holds its own parameters again,
    and no longer those that `torch.func.functional_call` or an estimate had put into it. With this context
    the block runs with those of its forward pass::

        checkpoint(self.block, x, use_reentrant=False, context_fn=checkpoint_context(self.block))

        model.gradient_checkpointing_enable(  # in a model of Hugging Face
            {"use_reentrant": False, "context_fn": checkpoint_context(model)}
        )

    Costs a reference to each tensor of the module at each checkpoint.

    Raises:
        ArgumentError: if it is no module.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"checkpoint_context takes a torch.nn.Module, not {module!r}")
    return lambda: (nullcontext(), Reentered(module))


def refuse_other_tensors(nodes: Iterable[Node]) -> None:
    """Refuse checkpoints of blocks that would run again with other tensors than in the forward pass.

    Blocks that get all that they use as arguments are right as they are.

    Raises:
        UnsupportedOpError: for a block that reads a module without `checkpoint_context`.
    """
    for node in nodes:
        found = recomputation(node)
        if found is not None and not isinstance(found.context, Reentered) and reads_module(found.reads):
            raise UnsupportedOpError(
                explain(
                    "the loss holds torch.utils.checkpoint of a module, which runs its block again in the "
                    "backward pass",
                    "By then the module holds other parameters, and the derivative would be theirs.",
                    (
                        "have it run with those of the forward pass: checkpoint(block, x, "
                        "use_reentrant=False, context_fn=hypergrad_torch.checkpoint_context(block))",
                        "or hand the block all that it uses as arguments",
                    ),
                )
            )
