"""T1 and T2 losses of a module: in place, as one trains, and as functions during one estimate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from hypergrad.backend import Tree
from hypergrad.backend.arguments import check_loss
from hypergrad.errors import ArgumentError
from hypergrad.problems.bilevel import Bilevel
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.graph import detach, history, reached_by
from hypergrad_torch.module.functional import Buffers, Functional
from hypergrad_torch.module.optimizer_step import Trainer
from hypergrad_torch.module.window import Record
from hypergrad_torch.randomness import generators

Gradients = dict[str, Tensor | None]
"""By name; ``None`` where the loss does not depend on a parameter."""


@final
@dataclass(frozen=True, eq=False)
class Objective:
    """The two losses of a module, ``loss(model, hparams, batch)``, with micro-batches in T1."""

    problem: Bilevel
    functional: Functional
    micro_batches: int

    def parts(self, batch: Any) -> Sequence[Any]:
        """The micro-batches of a training batch.

        Raises:
            ArgumentError: if it is no sequence of so many.
        """
        if self.micro_batches == 1:
            return [batch]
        if not isinstance(batch, Sequence) or len(batch) != self.micro_batches:
            size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
            raise ArgumentError(
                f"ModuleTuner: a training batch is a sequence of micro_batches = {self.micro_batches}, and "
                f"this is a {type(batch).__name__}{size}"
            )
        return batch

    def share(self, loss: Any) -> Any:
        """What the loss of one micro-batch adds to their mean."""
        return loss if self.micro_batches == 1 else loss / self.micro_batches

    def training_gradient(
        self, backend: TorchBackend, batch: Any, params: dict[str, Any]
    ) -> tuple[Tensor, Gradients]:
        """C̃1 and its gradient as in the user's own loop: the module's buffers and draws go on.

        Raises:
            ArgumentError: if a loss is not scalar.
        """
        values, gradients = [], []
        for part in self.parts(batch):
            loss = self.share(self.functional.in_place(self.problem.inner, part))  # type: ignore[arg-type]
            check_loss(backend, "inner (the T1 loss)", loss)
            values.append(loss.detach())
            gradients.append(_gradients(loss, params))
        value: Tensor = sum(values[1:], values[0])
        return value, _summed(gradients)


@final
class Pass:
    """The losses during one estimate, and what its training pass leaves behind.

    If ``trains``, the first evaluation of C̃1 is the training pass: ``buffers`` and ``draws`` are then what it
    leaves, and C2 is evaluated with them. If not, training is over, and both are as the module has them now.
    The evaluation of C2 leaves nothing.
    """

    def __init__(self, objective: Objective, trainer: Trainer, trains: bool) -> None:
        self._objective, self._trainer, self._trains = objective, trainer, trains
        functional = objective.functional
        self.buffers, self.draws, self._modes = functional.buffers(), generators.state(), functional.modes()
        self._gradients: Gradients | None = None
        self._used: dict[str, bool] = {}

    @property
    def problem(self) -> Bilevel:
        """The losses as functions of parameters, hyperparameters, and a `Record` or a batch of T2."""
        return Bilevel(self._inner, self._outer)

    def _inner(self, theta: dict[str, Tensor], lam: Tree, record: Record) -> Tensor:
        objective = self._objective
        theta, buffers, terms = _variables(theta), _copies(record.buffers), []
        with generators.replay(record.draws):
            for part in objective.parts(record.batch):
                term = objective.functional(
                    objective.problem.inner,  # type: ignore[arg-type]
                    theta,
                    lam,
                    part,
                    buffers,
                    record.modes,
                )
                terms.append(objective.share(term))
            draws = generators.state()
        value: Tensor = sum(terms[1:], terms[0])
        if self._trains and isinstance(value, Tensor):
            self._trains, self.buffers, self.draws = False, detach(buffers), draws
            self._note_gradients(terms, theta)
        return value

    def _outer(self, theta: dict[str, Tensor], lam: Tree, batch: Any) -> Tensor:
        loss, buffers = self._objective.problem.outer, _copies(self.buffers)
        with generators.replay(self.draws):
            return self._objective.functional(loss, _variables(theta), lam, batch, buffers, self._modes)

    def plain(self, gradients: dict[str, Tensor]) -> Gradients:
        """The training gradients to the bit, and none where the loss does not depend on a parameter."""
        if self._gradients is not None:
            return self._trainer.hooked(self._gradients)
        # Clipping works in place, on tensors that the formula uses afterwards.
        clipped = self._trainer.max_norm is not None
        return {
            name: None if not self._used[name] else g.detach().clone() if clipped else g.detach()
            for name, g in gradients.items()
        }

    def _note_gradients(self, terms: list[Tensor], theta: dict[str, Tensor]) -> None:
        """Note which parameters are used, and the gradients where those without a graph are other bits."""
        nodes = history(terms)
        self._used = dict(zip(theta, reached_by(list(theta.values()), nodes), strict=True))
        if len(terms) > 1 or _has_two_formulas(nodes):
            self._gradients = _summed([_gradients(term, theta, keep=True) for term in terms])


# Operations whose gradient torch computes by another formula, equal up to rounding, if it keeps a graph.
# `benchmarks/operators` looks for them among all operators of torch.
_TWO_FORMULAS = {
    "CumprodBackward0",
    "LinalgHouseholderProductBackward0",
    "LinalgSolveExBackward0",
    "MishBackward0",
    "NativeGroupNormBackward0",
    "OrmqrBackward0",
    "SiluBackward0",
    "WeightNormInterfaceBackward0",
}


def _has_two_formulas(nodes: Iterable[Any]) -> bool:
    """Would a gradient through these nodes be other bits with a graph than without?"""
    return any(node.name() in _TWO_FORMULAS for node in nodes)


def _gradients(loss: Tensor, theta: dict[str, Any], keep: bool = False) -> Gradients:
    gradients = torch.autograd.grad(loss, list(theta.values()), retain_graph=keep, allow_unused=True)
    return dict(zip(theta, gradients, strict=True))


def _summed(gradients: Sequence[Gradients]) -> Gradients:
    """Added up one after the other, as ``.grad`` accumulates."""
    total = dict(gradients[0])
    for more in gradients[1:]:
        for name, g in more.items():
            before = total[name]
            total[name] = g if before is None else before if g is None else before + g
    return total


def _variables(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that say, as parameters do, that they require grad: losses may ask."""
    return {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in theta.items()}


def _copies(buffers: Buffers) -> Buffers:
    return {name: buffer.clone() for name, buffer in buffers.items()}
