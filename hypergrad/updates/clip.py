"""Clipping of the gradient, as a part of the update map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError
from hypergrad.updates.base import UpdateRule, Updates, as_update_rule


@final
@dataclass(frozen=True)
class ClipNorm(UpdateRule):
    r"""Clip the norm of the gradient, then take the step of another rule (Pascanu et al. 2013, algorithm 1).

        g ← g · min(1, c / (‖g‖ + 1e-6))          c: max_norm,  ‖·‖ over all leaves together

    As ``torch.nn.utils.clip_grad_norm_``. The clipping is differentiated like everything else.

    Raises:
        ArgumentError: if ``max_norm`` is not a positive number, or ``rule`` is not an update rule.
    """

    rule: Updates
    max_norm: float

    def __post_init__(self) -> None:
        as_update_rule(self.rule)
        if not (is_number(self.max_norm) and self.max_norm > 0):
            raise ArgumentError(f"ClipNorm: max_norm = {self.max_norm!r}; it must be a positive number")

    @property
    def connected(self) -> bool:  # type: ignore[override]
        """Whether that of the rule inside is."""
        return as_update_rule(self.rule).connected

    def init(self, backend: Backend, params: Tree) -> Tree:
        return as_update_rule(self.rule).init(backend, params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        xp = backend.xp
        square = backend.inner(gradient, gradient)
        # The norm has no derivative at 0, where nothing is clipped.
        size = xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))
        factor = self.max_norm / (size + 1e-6)
        clipped = (square > 0) & (factor < 1)
        factor = xp.where(clipped, factor, xp.ones_like(factor))
        gradient = vectors.scale(backend, factor, gradient)
        return as_update_rule(self.rule).update(backend, gradient, opt_state, params, hparams, step)
