"""``torch.optim`` as update rules: what an optimiser's step does, in a form that has derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    the optimiser keeps for some parameters, given as a function of their name, and of what they begin with
    if that is not 0.
    """

    rule: Callable[[Options], UpdateRule]
    state: Callable[[Options, Callable[..., list[Tensor]]], Tree]


def _adam(kind: type[Adam] | type[AdamW]) -> Callable[[Options], UpdateRule]:
    def rule(o: Options) -> UpdateRule:
        beta1, beta2 = o["betas"]
        decoupled = AdamW if o.get("decoupled_weight_decay") else kind
        return decoupled(_number(o["lr"]), beta1, beta2, o["eps"], o["weight_decay"], o["amsgrad"])

    return rule


def _moments(o: Options, kept: Callable[..., list[Tensor]]) -> Moments:
    return Moments(kept("exp_avg"), kept("exp_avg_sq"), kept("max_exp_avg_sq") if o["amsgrad"] else ())


def _number(x: Any) -> Any:
    """Return a number unchanged, and a tensor as a constant function: reading it could wait for a device.

    Raises:
        ArgumentError: for a tensor with a graph, whose derivative the optimiser would lose.
    """
    if not isinstance(x, Tensor):
        return x
    if x.requires_grad:
        raise ArgumentError(f"an option of the optimiser is a tensor with a graph, {_SPELLING}")
    held = x.detach().clone()
    return lambda _: held


_SPELLING = (
    "which it takes for a constant: for a learned rate write "
    'hypergrad_torch.TorchOptimizer(optimizer, {"lr": lambda h: h["lr"]}) in place of the optimiser'
)
_LEARNABLE = ("lr", "weight_decay", "momentum", "dampening", "betas", "eps", "alpha", "lr_decay")

Hypers = Mapping[str, Any]
"""Options of a group that are functions of the hyperparameters; ``betas`` is a pair of functions."""


def refuse_captured(optimizer: Optimizer, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Refuse options of an optimiser that are hyperparameters themselves.

    Raises:
        ArgumentError: naming the option and the hyperparameter.
    """
    for group in optimizer.param_groups:
        for name, option in group.items():
            if isinstance(option, Tensor):
                for path, leaf in zip(paths, leaves, strict=True):
                    if option.device == leaf.device and option.data_ptr() == leaf.data_ptr():
                        raise ArgumentError(f"the optimiser's {name} is {path}, {_SPELLING}")


def by_group(optimizer: Optimizer, hypers: Hypers | Sequence[Hypers]) -> tuple[Hypers, ...]:
    """Return the learned options of each group.

    Raises:
        ArgumentError: unless there is one dict for each group, of functions of options that can be learned.
    """
    groups = optimizer.param_groups
    each = (hypers,) * len(groups) if isinstance(hypers, Mapping) else tuple(hypers)
    if len(each) != len(groups):
        raise ArgumentError(f"TorchOptimizer: {len(each)} dicts of options for {len(groups)} groups")
    for group, given in zip(groups, each, strict=True):
        for name, f in given.items():
            if name not in _LEARNABLE or name not in group:
                known = ", ".join(key for key in _LEARNABLE if key in group)
                raise ArgumentError(f"TorchOptimizer: {name!r} cannot be learned; these can: {known}")
            if not all(map(callable, f if name == "betas" and isinstance(f, tuple) else (f,))):
                raise ArgumentError(
                    f"TorchOptimizer: {name} = {f!r}; it must be a function of the hyperparameters, such as "
                    'lambda h: h["lr"]' + (", in a pair of two" if name == "betas" else "")
                )
    return each


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
        lambda o, kept: Total(kept("sum", o["initial_accumulator_value"])),
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
    touched. In functions it must have one group of parameters: groups of a module are trained by
    `ModuleTuner`, and those of a tree by `hypergrad.Partition`.

    Args:
        optimizer: an optimiser of `DIALECTS`.
        hypers: functions λ -> scalar by the names of options, for ``betas`` a pair of them; or a list of such
            dicts, one for each group. `ModuleTuner` writes their values into the optimiser before each step,
            which reads them (and so waits for a device).

    Raises:
        UnsupportedOpError: when it is used, for an optimiser not in `DIALECTS`.
        ArgumentError: for options that cannot be learned; when it is used, for several groups, and for an
            option that is a hyperparameter itself.
    """

    connected = True

    optimizer: Optimizer
    hypers: Hypers | Sequence[Hypers] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_group(self.optimizer, self.hypers)

    @property
    def formula(self) -> UpdateRule:
        return self if self._options.get("maximize") else dialect(self.optimizer).rule(self._options)

    @property
    def _options(self) -> Options:
        learned = by_group(self.optimizer, self.hypers)[0]
        return {**self.optimizer.param_groups[0], **learned, **_of_no_group(self.optimizer)}

    def init(self, backend: Backend, params: Tree) -> Tree:
        speak = dialect(self.optimizer)
        if len(self.optimizer.param_groups) > 1:
            raise ArgumentError(
                "an optimiser with several groups belongs to a module: use hypergrad_torch.ModuleTuner, or "
                "hg.Partition with a rule for each group"
            )
        return speak.rule(self._options).init(backend, params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        options = self._options
        if any(isinstance(option, Tensor) for option in options.values()):
            refuse_captured(self.optimizer, backend.paths(hparams, "hparams"), backend.flatten(hparams)[0])
        if options.get("maximize"):
            gradient = backend.map(lambda g: -g, gradient)
        rule = dialect(self.optimizer).rule(options)
        return rule.update(backend, gradient, opt_state, params, hparams, step)


register_optimiser("torch.Optimizer", TorchOptimizer)
