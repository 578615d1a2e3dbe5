"""Operations of torch that have no second derivative: errors that name them and say what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hypergrad.errors import DisconnectedError, UnsupportedOpError, explain
from hypergrad_torch.private import once_differentiable

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
    "weight_norm": (
        "torch's second derivative of it is wrong: write the weight as `g * v / v.norm(dim=1, keepdim=True)` "
        "in a parametrisation of your own"
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


def refuse_undifferentiable(nodes: Iterable[Any], second: bool) -> None:
    """Refuse operations whose second derivative torch computes wrongly without an error.

    ``once_differentiable`` raises only where the incoming gradient itself carries a graph. Behind a plain
    loss it does not, and the dependence on the function's inputs would be lost. The double backward of
    ``weight_norm`` treats its norms as constants, which is wrong if an outer derivative passes through the
    inputs themselves (``second``).

    Raises:
        UnsupportedOpError: naming the function.
    """
    for node in nodes:
        if second and node.name() == "WeightNormInterfaceBackward0":
            raise unsupported("weight_norm", _REMEDIES["weight_norm"])
        if (name := once_differentiable(node)) is not None:
            raise unsupported(f"the custom function {name}", _REMEDIES["custom"])
