"""A multiple of the identity in place of a solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hypergrad.backend import vectors
from hypergrad.solvers.base import ApproximateInverse, Prepared, check_positive
from hypergrad.solvers.system import System


@final
@dataclass(frozen=True)
class Identity(ApproximateInverse):
    r"""H⁻¹ ≈ η I: T1−T2 seen as an implicit method (Luketina et al. 2016, section 2.1).

        x = η v

    Takes no products. Exact if H is I/η; otherwise biased, which the report shows as a residual. With η the
    learning rate, it gives the response term of `Greedy(SGD(η))`.

    Args:
        scale: η.

    Raises:
        ArgumentError: if it is not positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("Identity", "scale", self.scale)

    def prepare(self, system: System) -> Prepared:
        return Prepared(lambda p: vectors.scale(system.backend, self.scale, p))
