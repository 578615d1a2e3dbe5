"""Plain containers of tensors as named arrays and a plan in JSON, for files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypergrad.errors import CheckpointError
from hypergrad.tuning.files import Head, damage_noticed

_IN_NUMPY = (torch.float16, torch.float32, torch.float64)
_BITS = {1: torch.uint8, 2: torch.int16}


def to_file(state: dict[str, Any]) -> tuple[Head, dict[str, Any]]:
    """Return the head and the arrays of a state whose own head is its entry ``head``.

    Raises:
        CheckpointError: as `to_arrays`.
    """
    arrays: dict[str, Any] = {}
    rest = {name: part for name, part in state.items() if name != "head"}
    plan = {name: to_arrays(part, name, arrays) for name, part in rest.items()}
    return state["head"] | {"plan": plan}, arrays


def from_file(stored: tuple[Head, dict[str, Any]]) -> dict[str, Any]:
    """Return the state that `to_file` was given.

    Raises:
        CheckpointError: if the plan and the arrays do not fit.
    """
    head, arrays = stored
    with damage_noticed("the plan of the file"):
        plan = head.pop("plan")
        return {"head": head} | {name: from_arrays(part, arrays) for name, part in plan.items()}


def to_arrays(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    """Return a plan of containers and numbers in the types of JSON, and put tensors into ``arrays``.

    Raises:
        CheckpointError: for an object that a file cannot hold, such as one of a class of the user's own.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        arrays[path] = _bits(held).numpy()
        return {"tensor": path, "dtype": str(held.dtype).removeprefix("torch."), "device": str(value.device)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        arrays[path] = value
        return {"array": path}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, to_arrays(x, f"{path}[{key!r}]", arrays)] for key, x in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [to_arrays(x, f"{path}[{k}]", arrays) for k, x in enumerate(value)]}
    raise CheckpointError(
        f"{path} is {type(value).__name__}, which a file of arrays cannot hold: write the state_dict by a "
        "program of your own, such as torch.save"
    )


def from_arrays(plan: Any, arrays: dict[str, Any]) -> Any:
    """Return the containers of a plan, with tensors on the devices where they lay.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: if it is no plan, or an array is missing.
    """
    if not isinstance(plan, dict):
        return plan
    kind, content = next(iter(plan.items()))
    if kind == "tensor":
        dtype = getattr(torch, plan["dtype"])
        return torch.from_numpy(arrays[content]).view(dtype).to(plan["device"])
    if kind == "array":
        return arrays[content]
    if kind == "dict":
        return {key: from_arrays(entry, arrays) for key, entry in content}
    entries = [from_arrays(entry, arrays) for entry in content]
    return {"list": list, "tuple": tuple}[kind](entries)


def _bits(x: Tensor) -> Tensor:
    """Return a tensor that NumPy can hold: of a dtype that it lacks, integers of the same bits."""
    return x.view(_BITS[x.element_size()]) if x.is_floating_point() and x.dtype not in _IN_NUMPY else x
