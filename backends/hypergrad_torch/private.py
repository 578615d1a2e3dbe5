"""What torch has no public name for: the backend reads private names of torch here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import function
from torch.optim import Optimizer

Node = Any


def is_symbolic(x: Tensor) -> bool:
    """Can the values of a tensor not be read without waiting: on a device, in ``torch.func``, or traced?"""
    return not x.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(x) or isinstance(x, FakeTensor)


def read_later(flag: Tensor) -> Callable[[], bool] | None:
    """What reads a flag once it has arrived from its device; ``None`` if it has no value to arrive."""
    if flag.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(flag) or isinstance(flag, FakeTensor):
        return None
    if not flag.is_cuda:
        return lambda: bool(flag)
    held = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> bool:
        arrived.synchronize()
        return bool(held)

    return read


def axpy_of_all(a: float, xs: list[Tensor], ys: list[Tensor]) -> Sequence[Tensor]:
    """Return a x + y for each pair of tensors of one dtype, by one call of torch."""
    return torch._foreach_add(ys, xs, alpha=a)


def saved_bytes(nodes: set[Node]) -> int:
    """Bytes of the tensors that the nodes keep for the backward pass, each storage counted once.

    Tensors that a hook would bring back, from the host or by a checkpoint, are not held and not counted.
    """
    storages: dict[int, int] = {}
    for node in nodes:
        for saved in _saved(node):
            if getattr(saved, "unpack_hook", None) is None and isinstance(saved.data, Tensor):
                storage = saved.data.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def is_checkpointed(node: Node) -> bool:
    """Does ``torch.utils.checkpoint`` hold a place for a tensor that this node saved?"""
    return any(type(saved.data).__name__ == "_Holder" for saved in _saved(node))


def _saved(node: Node) -> Iterator[Any]:
    for name in _saved_names(node.__class__):
        saved = getattr(node, name, None)
        yield from (x for x in (saved if isinstance(saved, tuple | list) else (saved,)) if hasattr(x, "data"))


@cache
def _saved_names(kind: Any) -> tuple[str, ...]:
    """The attributes under which a kind of node shows what it saved, without bringing it back."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def once_differentiable(node: Node) -> str | None:
    """The name of a node's custom function, if its backward is marked ``once_differentiable``."""
    custom: Any = getattr(node, "_forward_cls", None)
    backward = getattr(custom, "backward", None)
    code = getattr(backward, "__code__", None)
    marked = code is not None and code.co_filename == function.__file__ and hasattr(backward, "__wrapped__")
    return custom.__name__ if marked else None


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Were hooks registered around this optimiser's step?"""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
