"""What torch has no public name for: the backend reads private names of torch here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import function
from torch.nn.modules import _functions
from torch.optim import Optimizer

Node = Any
Slots = dict[str, Any]


def is_symbolic(x: Tensor) -> bool:
    """Can the values of a tensor not be read without waiting: on a device, in ``torch.func``, or traced?"""
    return not x.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(x) or isinstance(x, FakeTensor)


class Later:
    """A flag on its way from a device: ``ready`` does not wait for it, and calling this object does."""

    def __init__(self, flag: Tensor) -> None:
        self._held, self._arrived = flag, None
        if flag.is_cuda:
            self._held = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    @property
    def ready(self) -> bool:
        """Has it arrived?"""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def __call__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._held)


def read_later(flag: Tensor) -> Later | None:
    """What reads a flag once it has arrived from its device; ``None`` if it has no value to arrive."""
    if flag.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(flag) or isinstance(flag, FakeTensor):
        return None
    return Later(flag)


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
                for dense in _dense_parts(saved.data):
                    storage = dense.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _dense_parts(x: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that hold the numbers of a tensor: of a sparse one its values and indices."""
    if x.layout is torch.strided:
        return (x,)
    if x.layout is torch.sparse_coo:
        return x._values(), x._indices()
    rows = x.layout in (torch.sparse_csr, torch.sparse_bsr)
    return x.values(), *((x.crow_indices(), x.col_indices()) if rows else (x.ccol_indices(), x.row_indices()))


class Recomputation(NamedTuple):
    """A block that ``torch.utils.checkpoint`` will run again: in which context, and all that it reads."""

    context: Any
    reads: tuple[Any, ...]


def recomputation(node: Node) -> Recomputation | None:
    """Return the block that will run again for what this node saved; ``None`` if it saved tensors itself."""
    names = _saved_names(node.__class__)
    if not names:
        return None
    # A checkpoint holds a place for every tensor that its block saves: one of them is enough.
    first: Any = getattr(node, names[0], None)
    if first is None or isinstance(first, tuple | list):
        first = next(_saved(node), None)
    if getattr(first, "unpack_hook", None) is None or type(first.data).__name__ != "_Holder":
        return None
    frame = _variables_of(first.unpack_hook)["frame"]
    held = _variables_of(frame.recompute_fn)
    return Recomputation(
        held.get("recompute_context"), (held.get("fn"), held.get("kwargs"), *_arguments_of(frame))
    )


def _arguments_of(frame: Any) -> list[Any]:
    """Return the arguments of a block that will run again; ``None`` for the tensors in torch 2.10."""
    saved: list[Any] | None = getattr(frame, "saved_args", None)
    if saved is None:
        saved = _variables_of(frame.input_saver.grad_fn.get_args)["args"]
    return saved


def _variables_of(f: Any) -> dict[str, Any]:
    """Return the variables that a function has from the one around it, as far as they have values."""
    found = {}
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        with suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _saved(node: Node) -> Iterator[Any]:
    for name in _saved_names(node.__class__):
        saved = getattr(node, name, None)
        yield from (x for x in (saved if isinstance(saved, tuple | list) else (saved,)) if hasattr(x, "data"))


@cache
def _saved_names(kind: Any) -> tuple[str, ...]:
    """The attributes under which a kind of node shows what it saved, without bringing it back."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def saved_as(node: Node, name: str) -> Any:
    """Return what a node keeps for its backward pass under a name."""
    return getattr(node, f"_saved_{name}")


def slots_of(module: nn.Module) -> tuple[Slots, Slots]:
    """Return the dictionaries in which a module itself holds its parameters and its buffers."""
    return module._parameters, module._buffers


HookFunction: Any = _functions.BackwardHookFunction
"""The identity, as a custom function by which torch calls the backward hooks of a module."""

_register_hook = Tensor.register_hook


def watch_hooks(changed: Callable[[Callable[[Tensor], Any]], Callable[[Tensor], Any] | None]) -> None:
    """From now on have hooks of tensors pass through ``changed``, which may replace them.

    No graph shows these hooks. ``changed`` returns ``None`` for those that it leaves alone.
    """

    @wraps(_register_hook)
    def register_hook(self: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        return _register_hook(self, changed(hook) or hook)  # type: ignore[no-untyped-call]

    Tensor.register_hook = register_hook  # type: ignore[method-assign]


def hooks_of(x: Tensor) -> list[Callable[[Tensor], Any]]:
    """Return the hooks that see the gradient of a tensor, in the order in which torch calls them."""
    return list((x._backward_hooks or {}).values())


def hook_unwatched(x: Tensor, hook: Callable[[Tensor], Any]) -> None:
    """Register a hook that does not pass through `watch_hooks`."""
    _register_hook(x, hook)  # type: ignore[no-untyped-call]


def custom_function(kind: Any) -> Any:
    """Return the user's ``autograd.Function`` of a kind of node; ``None`` for nodes of torch itself.

    `HookFunction` is returned, too.
    """
    custom = getattr(kind, "_forward_cls", None)
    ours = custom is not None and custom.__module__.split(".")[0] in ("torch", "hypergrad_torch")
    return None if ours and custom is not HookFunction else custom


def once_differentiable(custom: Any) -> bool:
    """Is the backward of a custom function marked ``once_differentiable``?"""
    backward = getattr(custom, "backward", None)
    code = getattr(backward, "__code__", None)
    return code is not None and code.co_filename == function.__file__ and hasattr(backward, "__wrapped__")


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Were hooks registered around this optimiser's step?"""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def nodes_before(todo: list[Node], ends: Collection[Node] = ()) -> set[Node]:
    """The nodes before some others, these included, and nothing before the ``ends``."""
    nodes = set(todo)
    while todo:
        node = todo.pop()
        if node in ends:
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in nodes:
                nodes.add(parent)
                todo.append(parent)
    return nodes
