"""``torch.optim`` as update rules: what an optimiser's step does, in a form that has derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad.updates import SGD, Adagrad, Adam, AdamW, RMSprop, UpdateRule, register_optimiser
from hypergrad.updates.adagrad import Total
from hypergrad.updates.adam import Moments
from hypergrad.updates.rmsprop import Square
from hypergrad.updates.sgd import Momentum
from hypergrad_torch.private import has_step_hooks

Options = Mapping[str, Any]


class Dialect(NamedTuple):
    """How one class of optimiser is read.

    ``rule`` makes the update rule from a group's options, ``state`` the rule's state from the tensors that
    the optimiser keeps for some parameters, given as a function of their name.
    """

    rule: Callable[[Options], UpdateRule]
    state: Callable[[Options, Callable[[str], list[Tensor]]], Tree]


def _adam(kind: type[Adam] | type[AdamW]) -> Callable[[Options], UpdateRule]:
    def rule(o: Options) -> UpdateRule:
        beta1, beta2 = o["betas"]
        decoupled = AdamW if o.get("decoupled_weight_decay") else kind
        return decoupled(_number(o["lr"]), beta1, beta2, o["eps"], o["weight_decay"], o["amsgrad"])

    return rule


def _moments(o: Options, kept: Callable[[str], list[Tensor]]) -> Moments:
    return Moments(kept("exp_avg"), kept("exp_avg_sq"), kept("max_exp_avg_sq") if o["amsgrad"] else ())


def _number(x: Any) -> Any:
    """Return a number unchanged, and a tensor as a constant function: reading it could wait for a device."""
    if not isinstance(x, Tensor):
        return x
    held = x.detach().clone()
    return lambda _: held


DIALECTS: dict[type[Optimizer], Dialect] = {
    torch.optim.SGD: Dialect(
        lambda o: SGD(_number(o["lr"]), o["momentum"], o["nesterov"], o["weight_decay"], o["dampening"]),
        lambda o, kept: Momentum(kept("momentum_buffer")) if o["momentum"] else (),
    ),
    torch.optim.Adam: Dialect(_adam(Adam), _moments),
    torch.optim.AdamW: Dialect(_adam(AdamW), _moments),
    torch.optim.RMSprop: Dialect(
        lambda o: RMSprop(
            _number(o["lr"]), o["alpha"], o["eps"], o["momentum"], o["weight_decay"], o["centered"]
        ),
        lambda o, kept: Square(
            kept("square_avg"),
            kept("momentum_buffer") if o["momentum"] else (),
            kept("grad_avg") if o["centered"] else (),
        ),
    ),
    torch.optim.Adagrad: Dialect(
        lambda o: Adagrad(
            _number(o["lr"]), o["lr_decay"], o["eps"], o["weight_decay"], o["initial_accumulator_value"]
        ),
        lambda o, kept: Total(kept("sum")),
    ),
}
"""The optimisers that are differentiated through. A subclass may do anything, and is not among them."""


def dialect(optimizer: Optimizer) -> Dialect:
    """How an optimiser is read.

    Raises:
        UnsupportedOpError: if it is none of `DIALECTS`, with their names and the way out.
    """
    known = DIALECTS.get(type(optimizer))
    if known is None:
        names = ", ".join(f"torch.optim.{kind.__name__}" for kind in DIALECTS)
        raise UnsupportedOpError(
            explain(
                f"the step of {type(optimizer).__module__}.{type(optimizer).__qualname__} cannot be "
                "differentiated through",
                "Its formula is not known here, and the hypergradient passes through it.",
                (
                    f"train with one of {names}",
                    "take the hypergradient of eq. 3 instead, which leaves the optimiser out: "
                    'hg.Greedy(optimizer, response="gradient") works with any',
                    "write the optimiser as a pair (init, update)",
                ),
            )
        )
    return known


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
    optimizer: Optimizer, params: Sequence[Tensor], first: int, steps: Sequence[Taken]
) -> tuple[Replay, Tree]:
    """Steps that the optimiser takes from where it stands, as an update rule of a list of parameters.

    Returns the rule and its state, whose tensors are the optimiser's own, not copies. ``first`` is the number
    that the caller gives to the first step; the optimiser counts steps for each parameter on its own.

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
        each = [taken.options[owner[id(p)]] for taken in steps]
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

        def kept(name: str, state: Any = state, p: Tensor = p) -> list[Tensor]:
            tensor = state.get(name)
            return [torch.zeros_like(p, requires_grad=False) if tensor is None else tensor]

        states.append(speak.state(ever, kept))
    return Replay(tuple(zip(*columns, strict=True)), first), tuple(states)


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

    The options are read when the rule is used, as they are then. `init` gives zeros however many steps the
    optimiser has taken, and the optimiser's own state is never touched. It must have one group of parameters:
    several groups belong to a module, which `ModuleTuner` trains.

    Raises:
        UnsupportedOpError: when it is used, for an optimiser not in `DIALECTS`.
        ArgumentError: when it is used, for an optimiser with several groups.
    """

    connected = True

    optimizer: Optimizer

    @property
    def formula(self) -> UpdateRule:
        group = self.optimizer.param_groups[0]
        return self if group.get("maximize") else dialect(self.optimizer).rule(group)

    def init(self, backend: Backend, params: Tree) -> Tree:
        speak, options = dialect(self.optimizer), self.optimizer.param_groups
        if len(options) > 1:
            raise ArgumentError(
                "an optimiser with several groups belongs to a module: use hypergrad_torch.ModuleTuner, or "
                "write its groups as a pair (init, update)"
            )
        return speak.rule(options[0]).init(backend, params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        group = self.optimizer.param_groups[0]
        if group.get("maximize"):
            gradient = backend.map(lambda g: -g, gradient)
        rule = dialect(self.optimizer).rule(group)
        return rule.update(backend, gradient, opt_state, params, hparams, step)


register_optimiser("torch.Optimizer", TorchOptimizer)
