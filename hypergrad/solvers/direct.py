"""The dense solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from hypergrad import vectors
from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Matvec, Solution, Solver


@final
@dataclass(frozen=True)
class Direct(Solver):
    r"""Form H from n products and solve by its eigenvalues: x = Q Λ⁻¹ Qᵀ v.

    For small problems and as a yardstick: n products, n² numbers in memory, O(n³) time. The eigenvalues
    say what went wrong: one that is lost in the rounding of the largest is ``singular``, a negative one
    ``negative_curvature``.

    Args:
        max_unknowns: the largest n that is accepted.
        rtol: the relative residual above which a solution counts as failed.

    Raises:
        ArgumentError: for more unknowns than that, with the size of the matrix.
    """

    max_unknowns: int = 4096
    rtol: float = 1e-4

    def promises(self) -> float | None:
        return self.rtol

    def solve(self, backend: Backend, matvec: Matvec, v: Tree) -> Solution:
        xp = backend.xp
        flat, unravel = backend.ravel(v)
        n = vectors.size(backend, v)
        if n > self.max_unknowns:
            gib = n * n * backend.describe(flat).itemsize / 2**30
            raise ArgumentError(
                f"Direct: {n} unknowns make a Hessian of {gib:.1f} GiB and {n} products; use CG, or raise "
                f"max_unknowns above {self.max_unknowns}"
            )
        identity = backend.asarray(np.eye(n), like=flat)

        def column(hessian: Tree, k: Any, _: Any) -> tuple[Tree, None]:
            unit = identity[k]
            product, _ = backend.ravel(matvec(unravel(unit)))
            return hessian + xp.reshape(unit, (n, 1)) * xp.reshape(product, (1, n)), None

        hessian, _ = backend.scan(column, 0.0 * identity, n)
        # What is not finite is reported elsewhere; LAPACK need not stumble over it.
        hessian = xp.where(xp.isfinite(hessian), hessian, 0.0 * identity)
        eigenvalues, q = xp.linalg.eigh(0.5 * (hessian + hessian.T))
        largest, smallest = xp.max(xp.abs(eigenvalues)), xp.min(eigenvalues)
        rounding = n * float(xp.finfo(flat.dtype).eps) * largest
        lost = xp.abs(eigenvalues) <= rounding
        failure = xp.where(
            xp.any(lost),
            int(Failure.SINGULAR),
            xp.where(smallest < 0, int(Failure.NEGATIVE_CURVATURE), int(Failure.NONE)),
        )
        inverse = xp.where(lost, 0.0 * eigenvalues, 1.0 / xp.where(lost, largest + 1.0, eigenvalues))
        x = unravel(q @ (inverse * (q.T @ flat)))
        return Solution(x, n, n, failure, largest)
