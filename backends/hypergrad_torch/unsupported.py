"""Operations of torch that have no second derivative: errors that name them and say what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hypergrad.errors import ArgumentError, DisconnectedError, UnsupportedOpError, explain
from hypergrad_torch.private import HookFunction, custom_function, is_symbolic, once_differentiable, saved_as

_DOUBLE_BACKWARD = re.compile(
    r"derivative for '?(?:aten::)?(?P<op>[\w.]+?)'? is not implemented"
    r"|(?P<compiled>torch\.compile with aot_autograd does not currently support double backward)"
    r"|(?P<once>differentiate twice a function that was marked with @once_differentiable)"
    r"|(?P<checkpoint>torch\.utils\.checkpoint is incompatible)"
)

_REMEDIES = {
    "attention": (
        "attention ran in a fused kernel: wrap the loss in "
        "`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, whose second derivative exists"
    ),
    "rnn": "cuDNN's recurrent nets have none: wrap the loss in `torch.backends.cudnn.flags(enabled=False)`",
    "compiled": (
        "the loss holds a module compiled by torch.compile: hand in the module itself (`compiled._orig_mod`) "
        "and compile the whole estimate instead"
    ),
    "checkpoint": "leave `use_reentrant=True` out: that kind of checkpoint has no graph of its own",
    "custom": "write its backward in differentiable operations, without `once_differentiable`",
}

_DIFFERENCES = (
    "take the mixed term by finite differences of first-order gradients: pass products=hg.FiniteDifference()"
)


def unsupported(op: str, *remedies: str) -> UnsupportedOpError:
    """The error for an operation without a second derivative."""
    return UnsupportedOpError(
        explain(
            f"{op} has no second derivative in torch",
            "The hypergradient needs one: the derivative of the training gradient by the hyperparameters.",
            (*remedies, _DIFFERENCES),
        )
    )


@contextmanager
def translated() -> Iterator[None]:
    """Inside this block, torch's errors about missing derivatives are raised as errors of this library.

    Others pass unchanged.

    Raises:
        UnsupportedOpError: for an operation without a second derivative, by its name.
        DisconnectedError: for tensors that were made under ``torch.inference_mode``.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if match := _DOUBLE_BACKWARD.search(message):
            op = match["op"]
            if match["compiled"]:
                raise unsupported("a compiled module", _REMEDIES["compiled"]) from error
            if match["checkpoint"]:
                raise unsupported("a re-entrant checkpoint", _REMEDIES["checkpoint"]) from error
            if match["once"]:
                raise unsupported(
                    "a function marked with @once_differentiable", _REMEDIES["custom"]
                ) from error
            hint = "attention" if "attention" in op else "rnn" if "rnn" in op else None
            raise unsupported(f"the operation {op}", *([_REMEDIES[hint]] if hint else [])) from error
        if "Inference tensors cannot be saved for backward" in message:
            raise DisconnectedError(
                explain(
                    "a loss uses tensors that were made under torch.inference_mode",
                    "Torch keeps no graph for them.",
                    ("a batch or a constant was made there: pass `tensor.clone()`, taken outside of it",),
                ),
                "params",
            ) from error
        raise


_WRONG: dict[str, tuple[str, str, Callable[[Any, bool], bool]]] = {
    "WeightNormInterfaceBackward0": (
        "weight_norm",
        "torch's second derivative of it is wrong: write the weight as `g * v / v.norm(dim=1, keepdim=True)` "
        "in a parametrisation of your own",
        lambda node, second: second,
    ),
    "EmbeddingBackward0": (
        "an embedding with scale_grad_by_freq=True",
        "torch's second derivative of it is wrong: leave scale_grad_by_freq out",
        lambda node, second: saved_as(node, "scale_grad_by_freq"),
    ),
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_defaultBackward": (
        "linear_cross_entropy in chunks",
        "torch's second derivative of it is wrong: use linear and cross_entropy, one after the other",
        lambda node, second: True,
    ),
}
"""Operations whose double backward torch computes wrongly: name, remedy, and (node, second) -> is it wrong?

That of ``weight_norm`` treats its norms as constants, which is wrong if the outer derivative passes through
its inputs themselves (``second``). ``benchmarks/operators`` looks for such operations among all operators of
torch.
"""


def refuse_undifferentiable(nodes: Iterable[Any], nested: bool, second: bool) -> set[Any]:
    """Refuse operations whose second derivative torch computes wrongly without an error.

    Returns the custom functions among the nodes, whose backward pass may be anything. Hooks of modules may
    look at gradients, and raise an error when they change one.

    ``once_differentiable`` raises only where the incoming gradient itself carries a graph. Behind a plain
    loss it does not, and the dependence on the function's inputs would be lost: so it is refused if another
    derivative is being taken (``nested``); ``second`` says that this passes through the inputs of the loss.

    Raises:
        UnsupportedOpError: naming the function.
    """
    customs, updated = set(), []
    for node in nodes:
        kind = node.__class__
        if kind.__name__ == "NativeBatchNormBackward0" and saved_as(node, "training"):
            updated.append(saved_as(node, "running_mean"))
        wrong, custom = _about(kind)
        if wrong is not None and nested and wrong[2](node, second):
            raise unsupported(wrong[0], wrong[1])
        if custom is None:
            continue
        if custom is HookFunction:
            refuse_changes(node)
        elif nested and once_differentiable(custom):
            raise unsupported(f"the custom function {custom.__name__}", _REMEDIES["custom"])
        else:
            customs.add(custom)
    _refuse_captured(buffer for buffer in updated if buffer is not None)
    return customs


_updated: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The buffers that a BatchNorm has updated inside of a loss."""


def _refuse_captured(buffers: Iterable[Tensor]) -> None:
    """Refuse a BatchNorm that updates buffers which an earlier evaluation of a loss has updated already.

    Copies, such as those of an auxiliary state, are other tensors in each evaluation.

    Raises:
        ArgumentError: saying where buffers belong.
    """
    buffers = list(buffers)
    if any(buffer in _updated for buffer in buffers):
        raise ArgumentError(
            "a loss updates the buffers of a BatchNorm that it holds: an estimate evaluates it more often "
            "than training does, and each time they would change. Pass copies of the buffers as aux "
            "(has_aux=True), use hypergrad_torch.ModuleTuner, or BatchNorm with track_running_stats=False"
        )
    for buffer in buffers:
        _updated[buffer] = True


@cache
def _about(kind: Any) -> tuple[Any, Any]:
    """The entry of a kind of node in `_WRONG`, and its custom function."""
    return _WRONG.get(kind.__name__), custom_function(kind)


def refuse_changes(node: Any) -> None:
    """Let the node of a module's backward hooks raise an error when they change a gradient."""
    node.register_hook(_refuse_change)


def _refuse_change(after: Sequence[Any], before: Sequence[Any]) -> None:
    """A hook of a node that computes the identity, called after those of the user."""
    if any(x is not y and not same(x, y) for x, y in zip(after, before, strict=True)):
        raise changing_hook("a backward hook of a module")


def changing_hook(what: str) -> UnsupportedOpError:
    """The error for a hook that changes a gradient."""
    return UnsupportedOpError(
        explain(
            f"{what} changes a gradient",
            "It would change every derivative that passes it, of C1 and C2, first and second, and the "
            "hypergradient would be neither that of the losses nor that of the training.",
            ("leave the hook out, or put what it does into the loss", "a hook that returns None may stay"),
        )
    )


def same(x: Any, y: Any) -> bool:
    """Do a hook's argument and its result hold the same numbers?"""
    if x is None or y is None:
        return x is y
    return x.data_ptr() == y.data_ptr() if is_symbolic(x) else bool(torch.equal(x, y))
