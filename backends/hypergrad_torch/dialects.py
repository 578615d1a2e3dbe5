"""The optimisers of torch that are differentiated through, and their options, learned ones among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hypergrad.backend import Tree
from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad.updates import SGD, Adagrad, Adam, AdamW, RMSprop, UpdateRule
from hypergrad.updates.adagrad import Total
from hypergrad.updates.adam import Moments
from hypergrad.updates.rmsprop import Square
from hypergrad.updates.sgd import Momentum

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
