"""Trees and histories as plain containers of tensors, and the checks of what comes back from a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hypergrad.backend import Tree
from hypergrad.errors import ArgumentError, CheckpointError
from hypergrad.tuning import History
from hypergrad_torch.dialects import DIALECTS
from hypergrad_torch.graph import trees
from hypergrad_torch.randomness import Draws, generators


def write_tree(tree: Tree, root: str) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return dict(zip(trees.paths(tree, root), trees.flatten(tree)[0], strict=True))


def read_tree(stored: Any, model: Tree, root: str) -> Tree:
    """A tree like the model, with copies of the leaves that `write_tree` wrote.

    Raises:
        CheckpointError: if they belong to a tree of another structure or shape.
    """
    expected = write_tree(model, root)
    check_like(stored, expected, root)
    values = (stored[path] for path in expected)
    return trees.flatten(model)[1]([x.clone() if isinstance(x, Tensor) else x for x in values])


def write_history(history: History) -> dict[str, Any]:
    """The columns as tensors."""
    return {name: torch.from_numpy(np.array(column)) for name, column in history.arrays().items()}


def read_history(stored: Any) -> History:
    """What `write_history` wrote.

    Raises:
        CheckpointError: if it is not a history.
    """
    check_kind(stored, dict, "history")
    for name, column in stored.items():
        check_kind(column, Tensor, f"history[{name!r}]")
    return History.from_arrays({name: column.numpy() for name, column in stored.items()})


def write_draws(draws: Draws) -> list[Tensor]:
    """The states of the generators, that of the CPU first."""
    return [draws.cpu, *draws.devices]


def read_draws(stored: Any, path: str) -> Draws:
    """What `write_draws` wrote.

    Raises:
        CheckpointError: if these are not states of generators.
    """
    check_kind(stored, list, path, at_least=1)
    check_like(stored[0], generators.state().cpu, path)
    for state in stored:
        check_kind(state, Tensor, path)
        if state.dtype != torch.uint8:
            raise CheckpointError(f"{path} holds {state.dtype}, and states of generators are bytes")
    return Draws(stored[0], tuple(stored[1:]))


def check_kind(value: Any, kind: type, path: str, length: int | None = None, at_least: int = 0) -> None:
    """Check the type of a part of a state, and the length of a list.

    Raises:
        CheckpointError: if they are others.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{path} is {type(value).__name__}, not {kind.__name__}")
    if isinstance(value, list) and not max(at_least, length or 0) <= len(value) <= (length or len(value)):
        raise CheckpointError(f"{path} has {len(value)} entries, and {length or at_least} are needed")


def check_like(stored: Any, model: Any, path: str, beside: Sequence[str] = ()) -> None:
    """Check that plain containers have the structure of others, and their tensors the shapes and dtypes.

    Below keys that end with one of ``beside`` anything may be.

    Raises:
        CheckpointError: naming the first part that is another one.
    """
    if isinstance(model, Tensor):
        check_kind(stored, Tensor, path)
        mine, other = (f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (stored, model))
        if mine != other:
            raise CheckpointError(f"{path} is {mine}, here {other}")
    elif isinstance(model, dict):
        check_kind(stored, dict, path)
        if different := sorted(map(str, stored.keys() ^ model.keys())):
            raise CheckpointError(f"{path} has other keys than here; it differs in {', '.join(different)}")
        for key, entry in model.items():
            if not str(key).endswith(tuple(beside) or ("\0",)):
                check_like(stored[key], entry, f"{path}[{key!r}]", beside)
    elif isinstance(model, list | tuple):
        check_kind(stored, type(model), path)
        if len(stored) != len(model):
            raise CheckpointError(f"{path} has {len(stored)} entries, here {len(model)}")
        for k, entry in enumerate(model):
            check_like(stored[k], entry, f"{path}[{k}]", beside)
    elif isinstance(model, float):
        check_kind(stored, float, path)
    else:
        check_kind(stored, type(model), path)


def check_optimizer(stored: Any, optimizer: Optimizer, path: str) -> None:
    """Check that this optimiser can go on from a ``state_dict`` of another one.

    Raises:
        CheckpointError: naming what its groups or the state of a parameter lack.
    """
    check_kind(stored, dict, path)
    groups, states = stored.get("param_groups"), stored.get("state")
    check_kind(groups, list, f"{path}['param_groups']", len(optimizer.param_groups))
    check_kind(states, dict, f"{path}['state']")
    params: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    for k, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        at = f"{path}['param_groups'][{k}]"
        check_options(group, optimizer, k, at)
        check_kind(group.get("params"), list, f"{at}['params']", len(own["params"]))
        for index in group["params"]:
            check_kind(index, int, f"{at}['params']")
        params |= {index: (p, group) for index, p in zip(group["params"], own["params"], strict=True)}
    if len(params) < sum(len(group["params"]) for group in groups):
        raise CheckpointError(f"{path} has a parameter in two places")
    for index, state in states.items():
        p, group = params.get(index, (None, {}))
        check_state(state, optimizer, p, f"{path}['state'][{index!r}]", group)


def check_options(stored: Any, optimizer: Optimizer, k: int, path: str) -> None:
    """Check options of the k-th group of an optimiser.

    Raises:
        CheckpointError: if this group could not have them.
    """
    check_kind(stored, dict, path)
    if missing := sorted(optimizer.defaults.keys() - stored.keys()):
        raise CheckpointError(f"{path} is of another optimiser: it lacks {', '.join(missing)}")
    own = optimizer.param_groups[k]
    for name in optimizer.defaults:
        _check_option(stored[name], own[name], f"{path}[{name!r}]")
    if stored.get("capturable") and not own["capturable"]:
        raise CheckpointError(f"{path}['capturable'] is true, which not every device can do, and here false")
    if type(optimizer) in DIALECTS:
        try:
            DIALECTS[type(optimizer)].rule(stored)
        except ArgumentError as error:
            raise CheckpointError(f"{path} has options that no optimiser has: {error}") from error


def _check_option(stored: Any, own: Any, path: str) -> None:
    if own is None or isinstance(own, bool):
        right = stored is None or isinstance(stored, bool)
    elif isinstance(own, tuple):
        right = isinstance(stored, tuple) and len(stored) == len(own)
        for k, part in enumerate(stored if right else ()):
            _check_option(part, own[k], f"{path}[{k}]")
    else:
        right = not isinstance(own, int | float | Tensor) or _is_number(stored)
    if not right:
        raise CheckpointError(f"{path} is {stored!r}, here {own!r}")


def _is_number(value: Any) -> bool:
    """Return whether this is a finite number, which may be in a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(torch.isfinite(value).all())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_state(
    state: Any, optimizer: Optimizer, p: Tensor | None, path: str, options: dict[str, Any] | None = None
) -> None:
    """Check what an optimiser remembers of a parameter; ``options`` are those of its group.

    Raises:
        CheckpointError: if the parameter is not there, or if the optimiser could not go on with it.
    """
    if p is None:
        raise CheckpointError(f"{path} is of a parameter that is not there")
    check_kind(state, dict, path)
    known = DIALECTS.get(type(optimizer))
    if known is None:
        return
    needed: list[str] = []

    def kept(name: str, begin: float = 0.0) -> list[Tensor]:
        needed.append(name)
        return [p]

    known.state(options or _options_of(optimizer, p), kept)
    steps = 0 if type(optimizer) is torch.optim.SGD else state.get("step")
    if not _is_number(steps) or steps < 0:
        raise CheckpointError(f"{path}['step'] is {steps!r}, which is no number of steps")
    for name in needed:  # what the formula reads is what the optimiser's own step reads
        if name not in state:
            raise CheckpointError(f"{path} is of another optimiser: it lacks {name}")
        begun = type(optimizer) is not torch.optim.SGD or state[name] is not None
        if begun:  # SGD keeps None where there was no step with momentum yet
            check_like(state[name], p, f"{path}[{name!r}]")


def _options_of(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    groups = optimizer.param_groups
    return next((group for group in groups if any(p is q for q in group["params"])), groups[0])
