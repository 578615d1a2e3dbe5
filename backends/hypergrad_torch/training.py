"""The user's optimiser at work on the user's module, and a way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad import eager
from hypergrad.backend import Backend, Tree
from hypergrad.updates import ClipNorm, UpdateRule
from hypergrad_torch.optimizers import Options, translate


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
    max_norm: float | None

    def step(self, gradients: dict[str, Tensor | None]) -> None:
        """Move the parameters themselves, exactly as the user's own loop would."""
        with grads_kept(self.params.values()):
            for name, p in self.params.items():
                p.grad = gradients[name]
            if self.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.params.values(), self.max_norm)
            self.optimizer.step()

    def formula(
        self, step: int, options: Callable[[int, int], Options] | None = None
    ) -> tuple[UpdateRule, Tree]:
        """What `step` is going to do, as an update rule and its state; see `translate`."""
        groups, opt_state = translate(self.optimizer, eager.flatten(self.params)[0], step, options)
        return groups if self.max_norm is None else ClipNorm(groups, self.max_norm), opt_state

    def values(self) -> dict[str, Tensor]:
        """The parameters' values as they are now; they move with the parameters."""
        return {name: p.detach() for name, p in self.params.items()}


@final
@dataclass(frozen=True, eq=False)
class InPlace(UpdateRule):
    """An update rule that takes the optimiser's real step, once, and differentiates the formula for it.

    New parameters are, bit for bit, what torch's optimiser makes of them. ``used`` says which parameters
    the loss depends on: for the others torch has no gradient, and leaves them alone.
    """

    trainer: Trainer
    rule: UpdateRule | None
    used: Callable[[], dict[str, bool]]

    def init(self, backend: Backend, params: Tree) -> Tree:
        return ()

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        used = self.used()
        clipped = self.trainer.max_norm is not None  # in place, on what the formula goes on to use
        self.trainer.step(
            {
                name: None if not used[name] else g.detach().clone() if clipped else g.detach()
                for name, g in gradient.items()
            }
        )
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
