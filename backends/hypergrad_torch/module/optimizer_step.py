"""One step of the user's optimiser: on the module itself, on copies, and as a formula with derivatives."""

from __future__ import annotations

import copy
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
from hypergrad_torch.dialects import Hypers, Options
from hypergrad_torch.graph import trees
from hypergrad_torch.optimizers import Taken, replay
from hypergrad_torch.private import hooks_of


@final
class _Exactly(torch.autograd.Function):
    """The value that torch's own optimiser computed, with the derivative of the formula for it."""

    @staticmethod
    def forward(ctx: Any, formula: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@final
class LearnedOptions:
    """Options of an optimiser's groups that are functions of λ: their values are written into the groups."""

    def __init__(self, hypers: Sequence[Hypers], lam: Callable[[], Tree]) -> None:
        self.hypers, self._lam = hypers, lam
        self._written: list[dict[str, Any]] = [{} for _ in hypers]

    def forget(self) -> None:
        """Forget what was written: the optimiser has been put back to an earlier state."""
        self._written = [{} for _ in self.hypers]

    def write(self, optimizer: Optimizer) -> None:
        """Give the groups the values at the present λ.

        Raises:
            ArgumentError: if the optimiser no longer has the values that were written last.
        """
        lam = self._lam()
        for group, functions, written in zip(optimizer.param_groups, self.hypers, self._written, strict=True):
            for name, f in functions.items():
                if name in written and group[name] != written[name]:
                    raise ArgumentError(
                        f"ModuleTuner: {name} is a function of the hyperparameters, and something else has "
                        f"set it to {group[name]!r}: a scheduler's factor belongs into the function"
                    )
                value = tuple(float(part(lam)) for part in f) if isinstance(f, tuple) else float(f(lam))
                group[name] = written[name] = value


@final
@dataclass(frozen=True, eq=False)
class Trainer:
    """An optimiser and the tensors that it updates, by name, with the clipping before its step."""

    optimizer: Optimizer
    params: dict[str, nn.Parameter]
    max_norm: float | None = None
    learned: LearnedOptions | None = None

    def step(self, gradients: dict[str, Tensor | None]) -> None:
        """Update the tensors as the user's own loop would; their ``.grad`` is unchanged."""
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
        hypers = [{}] * len(self.optimizer.param_groups) if self.learned is None else self.learned.hypers
        rule, opt_state = replay(self.optimizer, trees.flatten(self.params)[0], first, steps, hypers)
        return rule if self.max_norm is None else ClipNorm(rule, self.max_norm), opt_state

    def now(self) -> Taken:
        """The step to come, if the loss depends on every parameter; where not, its gradient is zero.

        Raises:
            ArgumentError: if something else has changed an option that is learned.
        """
        if self.learned is not None:
            self.learned.write(self.optimizer)
        return Taken(options(self.optimizer), [True] * len(self.params))

    def state(self) -> dict[str, dict[str, Any]]:
        """A copy of what the optimiser remembers, by the names of the parameters."""
        kept = self.optimizer.state
        return {
            name: {key: copied(value) for key, value in kept[p].items()}
            for name, p in self.params.items()
            if p in kept
        }

    def twin(self) -> Trainer:
        """A trainer like this one over copies: its step changes neither the tensors nor the optimiser."""
        params = {name: nn.Parameter(copied(p)) for name, p in self.params.items()}
        replaced = {id(p): params[name] for name, p in self.params.items()}
        optimizer = copy.copy(self.optimizer)
        optimizer.param_groups = [
            group | {"params": [replaced.get(id(p), p) for p in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        optimizer.state = type(self.optimizer.state)(dict)
        optimizer.state.update({params[name]: kept for name, kept in self.state().items()})
        return Trainer(optimizer, params, self.max_norm, self.learned)

    def hooked(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """The gradients as the hooks of the parameters leave them."""
        return {name: _hooked(self.params[name], g) for name, g in gradients.items()}

    @property
    def has_hooks(self) -> bool:
        """Does any parameter have a gradient hook?"""
        return any(hooks_of(p) for p in self.params.values())

    def values(self) -> dict[str, Tensor]:
        """The tensors' values, which change as the tensors do."""
        return {name: p.detach() for name, p in self.params.items()}


def options(optimizer: Optimizer) -> list[Options]:
    """Return the current options of the groups; tensors are copied, since schedulers fill them in place."""
    return [
        {key: copied(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def _hooked(p: nn.Parameter, g: Any) -> Any:
    if g is not None:
        for hook in hooks_of(p):
            changed = hook(g)
            g = g if changed is None else changed
    return g


@final
@dataclass(frozen=True, eq=False)
class Hooked(UpdateRule):
    """A rule that takes gradients as the parameters' hooks leave them: the first derivative, and no other."""

    connected = True

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
class RealStep(UpdateRule):
    """An update rule that has the optimiser take its step, once, and differentiates the formula for it.

    The new parameters are, bit for bit, what torch's optimiser makes of them. ``stepped`` takes the step: the
    trainer itself, or its twin. ``plain`` turns gradients with a graph into those of the user's own loop: the
    same bits, and ``None`` for parameters that the loss does not depend on. Without ``rule`` the step has no
    derivative.
    """

    connected = True

    trainer: Trainer
    stepped: Trainer
    rule: UpdateRule | None
    plain: Callable[[dict[str, Tensor]], dict[str, Tensor | None]]

    def init(self, backend: Backend, params: Tree) -> Tree:
        return ()

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        gradient = self.trainer.hooked(gradient)
        self.stepped.step(self.plain(gradient))
        exact = self.stepped.values()
        constant = self.trainer.learned is None and not any(g.requires_grad for g in gradient.values())
        if self.rule is None or constant:
            return exact, opt_state
        formula, _ = self.rule.update(backend, gradient, opt_state, params, hparams, step)
        moved = {
            name: _Exactly.apply(formula[name], exact[name])  # type: ignore[no-untyped-call]
            for name in params
        }
        return moved, opt_state


@final
@dataclass(frozen=True, eq=False)
class HyperOptimizer(UpdateRule):
    """A ``torch.optim`` optimiser of λ's own tensors as an update rule of their free coordinates u.

    For its step the tensors hold u and their ``.grad`` is dC2/du, so that what the optimiser remembers
    belongs to u, too. Afterwards they hold u, and the caller puts λ back into them.
    """

    trainer: Trainer

    def holds(self, name: str) -> bool:
        """Does the optimiser update this tensor?"""
        held = (h for group in self.trainer.optimizer.param_groups for h in group["params"])
        return any(h is self.trainer.params[name] for h in held)

    def init(self, backend: Backend, params: Tree) -> Tree:
        return ()

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        leaves, unflatten = backend.flatten(params)
        tensors = self.trainer.params
        with torch.no_grad():
            for tensor, u in zip(tensors.values(), leaves, strict=True):
                tensor.copy_(u)
        self.trainer.step(dict(zip(tensors, backend.flatten(gradient)[0], strict=True)))
        return unflatten([copied(tensor) for tensor in tensors.values()]), opt_state


@contextmanager
def grads_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put ``.grad`` back after the block."""
    before = [(x, x.grad) for x in tensors]
    try:
        yield
    finally:
        for x, gradient in before:
            x.grad = gradient


def copied(value: Any) -> Any:
    """Return a copy of a tensor, and anything else unchanged."""
    return value.detach().clone() if isinstance(value, Tensor) else value
