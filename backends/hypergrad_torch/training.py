"""The user's optimiser at work on the user's module, and a way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.updates import ClipNorm, UpdateRule
from hypergrad_torch.graph import trees
from hypergrad_torch.optimizers import Options, Taken, replay


class _Exactly(torch.autograd.Function):
    """The value that torch's own optimiser computed, with the derivative of the formula for it."""

    @staticmethod
    def forward(ctx: Any, formula: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@final
@dataclass(frozen=True, eq=False)
class Trainer:
    """One step of the optimiser, given gradients: clipping, ``step()``, and ``.grad`` as it was found."""

    optimizer: Optimizer
    params: dict[str, nn.Parameter]
    max_norm: float | None = None

    def step(self, gradients: dict[str, Tensor | None]) -> None:
        """Move the parameters themselves, exactly as the user's own loop would."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        with grads_kept([*held, *self.params.values()]):
            for p in held:
                p.grad = None
            for name, p in self.params.items():
                p.grad = gradients[name]
            if self.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.params.values(), self.max_norm)
            self.optimizer.step()

    def formula(self, first: int, steps: Sequence[Taken]) -> tuple[UpdateRule, Tree]:
        """Steps from where the optimiser stands, as an update rule and its state; see `replay`."""
        rule, opt_state = replay(self.optimizer, trees.flatten(self.params)[0], first, steps)
        return rule if self.max_norm is None else ClipNorm(rule, self.max_norm), opt_state

    def now(self) -> Taken:
        """The step to come, if the loss depends on every parameter; where not, its gradient is zero."""
        return Taken(options(self.optimizer), [True] * len(self.params))

    def hooked(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """The gradients as the hooks of the parameters leave them."""
        return {name: _hooked(self.params[name], g) for name, g in gradients.items()}

    @property
    def has_hooks(self) -> bool:
        """Does any parameter have a gradient hook?"""
        return any(p._backward_hooks for p in self.params.values())

    def values(self) -> dict[str, Tensor]:
        """The parameters' values as they are now; they move with the parameters."""
        return {name: p.detach() for name, p in self.params.items()}


def options(optimizer: Optimizer) -> list[Options]:
    """The groups' options as they are now; tensors are copied, since schedulers fill them in place."""
    return [
        {key: copied(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def _hooked(p: nn.Parameter, g: Any) -> Any:
    if g is not None:
        for hook in (p._backward_hooks or {}).values():
            changed = hook(g)
            g = g if changed is None else changed
    return g


@final
@dataclass(frozen=True, eq=False)
class Hooked(UpdateRule):
    """A rule that sees gradients as the parameters' hooks leave them: the first derivative, and no other."""

    trainer: Trainer
    rule: UpdateRule

    def init(self, backend: Backend, params: Tree) -> Tree:
        return self.rule.init(backend, params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        gradient = self.trainer.hooked(gradient)
        return self.rule.update(backend, gradient, opt_state, params, hparams, step)


@final
@dataclass(frozen=True, eq=False)
class InPlace(UpdateRule):
    """An update rule that takes the optimiser's real step, once, and differentiates the formula for it.

    New parameters are, bit for bit, what torch's optimiser makes of them. ``plain`` turns gradients with a
    graph into those that the user's own loop would have had: the same bits, and ``None`` for parameters
    that the loss does not depend on.
    """

    trainer: Trainer
    rule: UpdateRule | None
    plain: Callable[[dict[str, Tensor]], dict[str, Tensor | None]]

    def init(self, backend: Backend, params: Tree) -> Tree:
        return ()

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        gradient = self.trainer.hooked(gradient)
        self.trainer.step(self.plain(gradient))
        exact = {name: self.trainer.params[name].detach() for name in params}
        if self.rule is None or not any(g.requires_grad for g in gradient.values()):
            return exact, opt_state
        formula, _ = self.rule.update(backend, gradient, opt_state, params, hparams, step)
        moved = {
            name: _Exactly.apply(formula[name], exact[name])  # type: ignore[no-untyped-call]
            for name in params
        }
        return moved, opt_state


@final
@dataclass(frozen=True, eq=False)
class Snapshot:
    """Parameters and optimiser state as they were, to compute with and to go back to."""

    trainer: Trainer
    params: dict[str, Tensor]
    state: dict[str, dict[str, Any]]

    @classmethod
    def take(cls, trainer: Trainer) -> Snapshot:
        """Copy what a step of the optimiser is going to change."""
        kept = trainer.optimizer.state
        state = {
            name: {key: copied(value) for key, value in kept[p].items()}
            for name, p in trainer.params.items()
            if p in kept
        }
        return cls(trainer, {name: p.detach().clone() for name, p in trainer.params.items()}, state)

    def restore(self) -> None:
        """Make everything as it was, in the tensors that hold it."""
        now = self.trainer.optimizer.state
        with torch.no_grad():
            for name, p in self.trainer.params.items():
                p.copy_(self.params[name])
                then = self.state.get(name)
                if then is None:
                    now.pop(p, None)
                    continue
                tensors = {key: x for key, x in now[p].items() if isinstance(x, Tensor) and key in then}
                now[p] = {
                    key: tensors[key].copy_(x) if key in tensors and isinstance(x, Tensor) else copied(x)
                    for key, x in then.items()
                }

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the optimiser's state read as it was: for a formula of a step that is over or to come."""
        now, params = self.trainer.optimizer.state, self.trainer.params
        found = {name: now.pop(p) for name, p in params.items() if p in now}
        now.update({params[name]: kept for name, kept in self.state.items()})
        try:
            yield
        finally:
            for name in self.state:
                now.pop(params[name])
            now.update({params[name]: kept for name, kept in found.items()})

    def write(self) -> dict[str, Any]:
        """Plain containers."""
        return {"params": self.params, "state": self.state}

    @classmethod
    def read(cls, trainer: Trainer, stored: dict[str, Any]) -> Snapshot:
        """What `write` returned."""
        return cls(trainer, stored["params"], stored["state"])


@contextmanager
def grads_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put ``.grad`` back as it was found."""
    found = [(x, x.grad) for x in tensors]
    try:
        yield
    finally:
        for x, gradient in found:
            x.grad = gradient


def copied(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def trained(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The module's parameters that the optimiser holds and moves, by name.

    Raises:
        ArgumentError: for tensors that are not the module's, and for hooks that would never be called.
    """
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"ModuleTuner: optimizer = {optimizer!r}; it is a torch.optim optimiser")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = dict(model.named_parameters())
    if foreign := held - {id(p) for p in own.values()}:
        raise ArgumentError(
            f"ModuleTuner: the optimizer holds {len(foreign)} tensors that are no parameters of the model: "
            "give those their own optimiser, or make them part of the module"
        )
    for name, p in own.items():
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ArgumentError(
                f"ModuleTuner: params[{name!r}] has a hook after gradient accumulation, such as an optimiser "
                "in the backward pass: gradients are not accumulated here, and it would never be called"
            )
    return {name: p for name, p in own.items() if id(p) in held and p.requires_grad}
