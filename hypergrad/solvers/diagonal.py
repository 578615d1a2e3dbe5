"""The diagonal of the Hessian, from random signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Tree
from hypergrad.errors import Failure
from hypergrad.solvers.base import (
    ApproximateInverse,
    Prepared,
    check_count,
    check_seed,
    check_size,
    check_tolerance,
)
from hypergrad.solvers.system import System


@final
@dataclass(frozen=True)
class Diagonal(ApproximateInverse):
    r"""H ≈ diag(H) + ρ I, the diagonal estimated from signs s = ±1 (Bekas, Kokiopoulou and Saad 2007).

        diag(H) ≈ (1/b) Σ s ⊙ H s,    x = v / (max(diag(H), 0) + ρ)

    Exact for a diagonal H with one probe; otherwise each entry is a mean of b samples, whose standard
    deviation is the norm of the rest of its row. As a solver it has a bias that the residual in the report
    shows; as a preconditioner of `CG` it evens out unequal scales of the parameters, and does not change the
    solution.

    Args:
        probes: b, the number of products.
        damping: ρ ≥ 0.
        seed: the random seed of the signs.
        rtol: the relative residual above which a solution counts as failed; by default nothing is promised.

    Raises:
        ArgumentError: if ``probes`` is not a positive integer, the damping is negative, or the seed is not an
            integer ≥ 0.
    """

    probes: int = 20
    damping: float = 0.0
    seed: int = 0
    rtol: float | None = None

    def __post_init__(self) -> None:
        check_count("Diagonal", "probes", self.probes)
        check_tolerance("Diagonal", self.rtol)
        check_size("Diagonal", "damping", self.damping)
        check_seed("Diagonal", self.seed)

    @property
    def needs_symmetry(self) -> bool:
        return True

    def prepare(self, system: System) -> Prepared:
        backend, xp = system.backend, system.backend.xp
        flat, unravel = backend.ravel(system.v)
        count = self.probes

        def probe(total: Any, k: Any, _: Any) -> tuple[Any, None]:
            drawn = backend.random.normal(self.seed, k, tuple(flat.shape), flat)
            signs = xp.where(drawn < 0, -xp.ones_like(flat), xp.ones_like(flat))
            product, _ = backend.ravel(system.product(unravel(signs)))
            return total + signs * product, None

        total, _ = backend.scan(probe, 0.0 * flat, count)
        largest = xp.max(xp.abs(total)) / count
        # An entry estimated at 0 or below is too small for the probes to resolve.
        floor = 1e-3 * largest
        entries = xp.maximum(total / count, floor + 0.0 * flat) + self.damping
        scale = unravel(1.0 / xp.where(entries > 0, entries, xp.ones_like(flat)))

        def apply(p: Tree) -> Tree:
            return backend.map(lambda x, s: x * s, p, scale)

        return Prepared(apply, count, int(Failure.NONE), largest)
