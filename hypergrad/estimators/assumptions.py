"""What an estimate does where its assumptions do not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final, get_args

from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError

Outcome = Literal["ignore", "warn", "raise"]


@final
@dataclass(frozen=True)
class Checks:
    """What `Implicit` does where its assumptions do not hold, in the terms of ``numpy.errstate``.

    Args:
        tolerance: the ‖∇C̃1‖ up to which θ counts as an optimum.
        away: what to do if ‖∇C̃1‖ is larger: ``"ignore"`` (for online use, where θ is still being trained),
            ``"warn"`` or ``"raise"``.
        unsolved: what to do if the solve failed: ``"ignore"`` or ``"warn"``, which accept the bias, or
            ``"raise"``.

    Raises:
        ArgumentError: if the tolerance is not a positive number, or for any other outcome.
    """

    tolerance: float = 1e-3
    away: Outcome = "warn"
    unsolved: Outcome = "raise"

    def __post_init__(self) -> None:
        if not (is_number(self.tolerance) and self.tolerance > 0):
            raise ArgumentError(f"Checks: tolerance = {self.tolerance!r}; it must be a positive number")
        for name in ("away", "unsolved"):
            if (outcome := getattr(self, name)) not in get_args(Outcome):
                raise ArgumentError(f"Checks: {name} = {outcome!r}; it must be 'ignore', 'warn' or 'raise'")
