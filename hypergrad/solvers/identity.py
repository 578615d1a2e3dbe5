"""No solve at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hypergrad import vectors
from hypergrad.backend import Backend, Tree
from hypergrad.solvers.base import Matvec, Solution, Solver


@final
@dataclass(frozen=True)
class Identity(Solver):
    r"""H⁻¹ ≈ η I: T1−T2 seen as an implicit method (Luketina et al. 2016, section 2.1).

        x = η v

    No products. Exact where H is I/η; otherwise a bias that was asked for, and that the report shows as
    a residual. With η the learning rate it is the response that `Greedy(SGD(η))` keeps.

    Args:
        scale: η.
    """

    scale: float = 1.0

    def promises(self) -> float | None:
        return None

    def solve(self, backend: Backend, matvec: Matvec, v: Tree) -> Solution:
        return Solution(vectors.scale(backend, self.scale, v), 0, 0)
