"""``torch.optim`` as update rules: what an optimiser's step does, in a form that has derivatives."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad.updates import Partition, UpdateRule, Updates, register_optimiser
from hypergrad_torch.dialects import Hypers, Options, by_group, dialect, refuse_captured
from hypergrad_torch.private import has_step_hooks


class Taken(NamedTuple):
    """A step that an optimiser took: the options of its groups, and which parameters had a gradient."""

    options: Sequence[Options]
    used: Sequence[bool]


class Move(NamedTuple):
    """One parameter's part of a step: its rule, how many steps it has taken, and whether it maximizes."""

    rule: UpdateRule
    count: Any
    maximize: bool


@final
@dataclass(frozen=True)
class Replay(UpdateRule):
    """Steps as torch's optimiser takes them: for each a `Move` of every parameter.

    ``None`` stands where a parameter has no gradient: torch then changes neither it nor its state.
    """

    connected = True

    steps: tuple[tuple[Move | None, ...], ...]
    first: int

    def init(self, backend: Backend, params: Tree) -> Tree:
        pairs = zip(backend.flatten(params)[0], self.steps[0], strict=True)
        return tuple(() if move is None else move.rule.init(backend, [leaf]) for leaf, move in pairs)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        leaves, unflatten = backend.flatten(params)
        slopes, moves = backend.flatten(gradient)[0], self.steps[step - self.first]
        moved, states = [], []
        for theta, g, kept, move in zip(leaves, slopes, opt_state, moves, strict=True):
            if move is not None:
                g = -g if move.maximize else g
                (theta,), kept = move.rule.update(backend, [g], kept, [theta], hparams, move.count)
            moved.append(theta)
            states.append(kept)
        return unflatten(moved), tuple(states)


def replay(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    first: int,
    steps: Sequence[Taken],
    hypers: Sequence[Hypers],
) -> tuple[Replay, Tree]:
    """Steps that the optimiser takes from where it stands, as an update rule of a list of parameters.

    Returns the rule and its state, whose tensors are the optimiser's own, not copies. ``first`` is the number
    that the caller gives to the first step; the optimiser counts steps for each parameter on its own.
    ``hypers`` are the learned options of each group.

    Raises:
        UnsupportedOpError: as for `dialect`, and for hooks around the optimiser's step.
    """
    speak = dialect(optimizer)
    if has_step_hooks(optimizer):
        raise UnsupportedOpError(
            explain(
                "the optimiser has hooks around its step, which may do anything",
                "The hypergradient would be that of a step without them.",
                (
                    "change gradients in the loss, by parameter hooks, or with max_norm=",
                    'leave the optimiser out: hg.Greedy(optimizer, response="gradient")',
                ),
            )
        )
    owner = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    columns, states = [], []
    for i, p in enumerate(params):
        group = owner[id(p)]
        each = [{**taken.options[group], **hypers[group], **_of_no_group(optimizer)} for taken in steps]
        used = [taken.used[i] for taken in steps]
        state = optimizer.state.get(p, {})
        counts = _counts(optimizer, state, each, used)
        columns.append(
            [
                Move(speak.rule(o), count, bool(o.get("maximize"))) if here else None
                for o, count, here in zip(each, counts, used, strict=True)
            ]
        )
        # The state holds what any of the steps needs.
        ever = {key: next((o[key] for o in each if o[key]), each[0][key]) for key in each[0]}

        states.append(speak.state(ever, partial(_kept, state, p)))
    return Replay(tuple(zip(*columns, strict=True)), first), tuple(states)


def _of_no_group(optimizer: Optimizer) -> Options:
    """Options that torch reads from the defaults alone, whatever the groups say."""
    return {k: v for k, v in optimizer.defaults.items() if k == "initial_accumulator_value"}


def _kept(state: Options, p: Tensor, name: str, begin: float = 0.0) -> list[Tensor]:
    """What an optimiser keeps for a parameter, or what it will begin with."""
    tensor = state.get(name)
    return [torch.full_like(p, begin, requires_grad=False) if tensor is None else tensor]


def _counts(optimizer: Optimizer, state: Any, each: Sequence[Options], used: Sequence[bool]) -> list[Any]:
    """How many steps a parameter had taken before each step; for SGD, whether its momentum had begun."""
    if type(optimizer) is torch.optim.SGD:
        warm, counts = int(state.get("momentum_buffer") is not None), []
        for o, here in zip(each, used, strict=True):
            counts.append(warm)
            warm = max(warm, int(here and bool(o["momentum"])))
        return counts
    start = state.get("step", 0)
    # A count on a device is not read, since that would mean waiting for the device.
    begin = start if isinstance(start, Tensor) and start.device.type != "cpu" else int(start)
    return [begin + sum(used[:k]) for k in range(len(used))]


@final
@dataclass(frozen=True, eq=False)
class TorchOptimizer(UpdateRule):
    """A ``torch.optim`` optimiser as an update rule of its own.

    The options are read when the rule is used, as they are then. Those in ``hypers`` are functions of the
    hyperparameters instead, and have hypergradients::

        TorchOptimizer(optimizer, {"lr": lambda h: h["lr"], "weight_decay": lambda h: h["l2"].exp()})

    `init` gives zeros however many steps the optimiser has taken, and the optimiser's own state is never
    touched. It also finds out to which group each parameter belongs, if there are several: the parameters are
    then those that the optimiser was made with, as in ``dict(module.named_parameters())``.

    Args:
        optimizer: an optimiser of `hypergrad_torch.dialects.DIALECTS`.
        hypers: functions λ -> scalar by the names of options, for ``betas`` a pair of them; or a list of such
            dicts, one for each group. `ModuleTuner` writes their values into the optimiser before each step,
            which reads them (and so waits for a device).

    Raises:
        UnsupportedOpError: when it is used, for an optimiser not in `hypergrad_torch.dialects.DIALECTS`.
        ArgumentError: for options that cannot be learned; when it is used, for an option that is a
            hyperparameter itself, and for parameters of unknown groups.
    """

    connected = True

    optimizer: Optimizer
    hypers: Hypers | Sequence[Hypers] = field(default_factory=dict)
    _rules: dict[Any, Partition] = field(default_factory=dict, init=False, repr=False)
    """The rule for each structure of parameters that `init` has seen, if there are several groups."""

    def __post_init__(self) -> None:
        by_group(self.optimizer, self.hypers)

    @property
    def formula(self) -> UpdateRule:
        return self if len(self.optimizer.param_groups) > 1 else _Group(self, 0).formula

    def init(self, backend: Backend, params: Tree) -> Tree:
        labels = self._group_of(backend, params) if len(self.optimizer.param_groups) > 1 else None
        if labels is not None:  # otherwise they are other tensors, perhaps of a known structure
            each: dict[Hashable, Updates] = {
                k: _Group(self, k) for k in range(len(self.optimizer.param_groups))
            }
            self._rules[backend.trees.structure(params)] = Partition(each, labels)
        return self._rule(backend, params).init(backend, params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        return self._rule(backend, params).update(backend, gradient, opt_state, params, hparams, step)

    def _rule(self, backend: Backend, params: Tree) -> UpdateRule:
        if len(self.optimizer.param_groups) == 1:
            return _Group(self, 0)
        known = self._rules.get(backend.trees.structure(params))
        if known is None:
            raise ArgumentError(
                "it is not known to which of the optimiser's groups these parameters belong: begin with the "
                "tensors that it was made with, by estimator.init(problem, dict(module.named_parameters()), "
                "…), use hg.Partition with a rule for each group, or for a module hypergrad_torch.ModuleTuner"
            )
        return known

    def _group_of(self, backend: Backend, params: Tree) -> Tree | None:
        """Return the number of each parameter's group; ``None`` if these are not the optimiser's tensors."""
        groups = self.optimizer.param_groups
        owner = {p.data_ptr(): k for k, group in enumerate(groups) for p in group["params"]}
        leaves, unflatten = backend.flatten(params)
        labels = [owner.get(leaf.data_ptr()) if isinstance(leaf, Tensor) else None for leaf in leaves]
        apart = len(owner) == sum(len(group["params"]) for group in groups)
        return unflatten(labels) if apart and None not in labels else None


@final
@dataclass(frozen=True, eq=False)
class _Group(UpdateRule):
    """The step of one group of an optimiser."""

    connected = True

    whole: TorchOptimizer
    number: int

    @property
    def formula(self) -> UpdateRule:
        options = self._options
        return self if options.get("maximize") else dialect(self.whole.optimizer).rule(options)

    @property
    def _options(self) -> Options:
        optimizer = self.whole.optimizer
        learned = by_group(optimizer, self.whole.hypers)[self.number]
        return {**optimizer.param_groups[self.number], **learned, **_of_no_group(optimizer)}

    def init(self, backend: Backend, params: Tree) -> Tree:
        return dialect(self.whole.optimizer).rule(self._options).init(backend, params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        options, optimizer = self._options, self.whole.optimizer
        if any(isinstance(option, Tensor) for option in options.values()):
            refuse_captured(optimizer, backend.paths(hparams, "hparams"), backend.flatten(hparams)[0])
        if options.get("maximize"):
            gradient = backend.map(lambda g: -g, gradient)
        rule = dialect(optimizer).rule(options)
        return rule.update(backend, gradient, opt_state, params, hparams, step)


register_optimiser("torch.Optimizer", TorchOptimizer)
