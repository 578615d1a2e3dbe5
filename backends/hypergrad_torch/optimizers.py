"""``torch.optim`` as update rules: what an optimiser's step does, in a form that has derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad.updates import SGD, Adagrad, Adam, AdamW, RMSprop, UpdateRule
from hypergrad.updates.adagrad import Total
from hypergrad.updates.adam import Moments
from hypergrad.updates.rmsprop import Square
from hypergrad.updates.sgd import Momentum

Options = dict[str, Any]


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
    """An option as it stands; a tensor as a constant function, so that no device is waited for."""
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
    found = DIALECTS.get(type(optimizer))
    if found is None:
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
    return found


class Part(NamedTuple):
    """Parameters that share a rule, by their places; their clock is ``offset`` ahead of the tuner's."""

    rule: UpdateRule
    places: tuple[int, ...]
    offset: int
    maximize: bool


@final
@dataclass(frozen=True)
class Groups(UpdateRule):
    """Parameter groups: a rule for each part of the parameters, which are a list."""

    parts: tuple[Part, ...]

    def init(self, backend: Backend, params: Tree) -> Tree:
        leaves = backend.flatten(params)[0]
        return tuple(part.rule.init(backend, [leaves[i] for i in part.places]) for part in self.parts)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        slopes, (leaves, unflatten) = backend.flatten(gradient)[0], backend.flatten(params)
        moved, states = list(leaves), []
        for part, kept in zip(self.parts, opt_state, strict=True):
            g = [-slopes[i] if part.maximize else slopes[i] for i in part.places]
            theta = [leaves[i] for i in part.places]
            theta, new = part.rule.update(backend, g, kept, theta, hparams, step + part.offset)
            states.append(new)
            for i, leaf in zip(part.places, theta, strict=True):
                moved[i] = leaf
        return unflatten(moved), tuple(states)


def translate(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    step: int,
    options: Callable[[int, int], Options] | None = None,
) -> tuple[Groups, Tree]:
    """An optimiser, as it stands before a step, as an update rule of a list of parameters and its state.

    The state's tensors are the optimiser's own, not copies. ``step`` is what the caller's clock shows, and
    ``options(group, count)`` stand in place of those of ``optimizer.param_groups``, ``count`` being what the
    optimiser's own clock shows.

    Raises:
        UnsupportedOpError: as for `dialect`.
        ArgumentError: if a parameter belongs to no group.
    """
    speak = dialect(optimizer)
    owner = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    alike: dict[tuple[int, int], list[int]] = {}
    for i, p in enumerate(params):
        if id(p) not in owner:
            raise ArgumentError(f"params[{i}] of shape {tuple(p.shape)} belongs to no group of the optimiser")
        done = optimizer.state.get(p, {}).get("step", 0)
        warm = bool(optimizer.state.get(p, {})) and type(optimizer) is torch.optim.SGD
        alike.setdefault((owner[id(p)], _count(done) + warm), []).append(i)
    parts, states = [], []
    for (group, count), places in alike.items():
        o = options(group, count) if options is not None else optimizer.param_groups[group]

        def kept(name: str, places: list[int] = places) -> list[Tensor]:
            found = [optimizer.state.get(params[i], {}).get(name) for i in places]
            return [
                torch.zeros_like(params[i], requires_grad=False) if x is None else x
                for i, x in zip(places, found, strict=True)
            ]

        parts.append(Part(speak.rule(o), tuple(places), count - step, bool(o.get("maximize"))))
        states.append(speak.state(o, kept))
    return Groups(tuple(parts)), tuple(states)


def _count(step: Any) -> int:
    """Steps done so far; torch keeps the number in a tensor on the CPU unless it is ``capturable``."""
    return int(step)


@final
@dataclass(frozen=True, eq=False)
class TorchOptimizer(UpdateRule):
    """A ``torch.optim`` optimiser as an update rule of its own.

    Read when it is used: its groups' options as they are then. It starts fresh: `init` gives zeros
    whatever the optimiser has seen, and its own state is never touched. One group of parameters and no
    more: groups belong to a module's parameters, and those to `ModuleTuner`.

    Raises:
        UnsupportedOpError: when it is used, for an optimiser not in `DIALECTS`.
        ArgumentError: when it is used, for an optimiser with several groups.
    """

    optimizer: Optimizer

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
