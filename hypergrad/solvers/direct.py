"""The dense solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Solver, check_count, check_tolerance, rounding
from hypergrad.solvers.system import Solution, System

_SIDE_BY_SIDE = 64


@final
@dataclass(frozen=True)
class Direct(Solver):
    r"""Form H from n products and solve by its eigenvalues, x = Q Λ⁻¹ Qᵀ v, or by its singular values.

    For small problems and as a yardstick: n products, n² numbers in memory, O(n³) time. A framework that maps
    takes up to 64 products side by side, and needs the memory of as many. The values say what
    went wrong: one that is lost in the rounding of the largest is ``singular``, a negative eigenvalue of a
    symmetric H ``negative_curvature``.

    Args:
        max_unknowns: the largest n that is accepted.
        rtol: the relative residual above which a solution counts as failed.

    Raises:
        ArgumentError: for more unknowns than that, with the size of the matrix.
    """

    max_unknowns: int = 4096
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        check_count("Direct", "max_unknowns", self.max_unknowns)
        check_tolerance("Direct", self.rtol)

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = system.begun()
        backend, xp = system.backend, system.backend.xp
        flat, unravel = backend.ravel(system.r)
        n = vectors.size(backend, system.r)
        if n > self.max_unknowns:
            gib = n * n * backend.describe(flat).itemsize / 2**30
            raise ArgumentError(
                f"Direct: {n} unknowns make a Hessian of {gib:.1f} GiB and {n} products; use CG, or raise "
                f"max_unknowns above {self.max_unknowns}"
            )
        identity = backend.asarray(np.eye(n), like=flat)

        side, places = _blocks(backend, n)

        def block(_: tuple[()], k: Any, __: Any) -> tuple[tuple[()], Any]:
            def column(i: Any) -> Any:
                return backend.ravel(system.product(unravel(identity[k * side + i])))[0]

            return (), backend.dense(backend.each(column, places))

        _, rows = backend.scan(block, (), -(-n // side))
        matrix = xp.reshape(backend.dense(rows), (-1, n))[:n].T
        # What is not finite is reported elsewhere; LAPACK need not stumble over it.
        matrix = xp.where(xp.isfinite(matrix), matrix, 0.0 * identity)
        if system.symmetric:
            values, q = xp.linalg.eigh(0.5 * (matrix + matrix.T))
            left, right, lowest = q.T, q, xp.min(values)
        else:
            u, values, right = xp.linalg.svd(matrix)
            left, right, lowest = u.T, right.T, 0.0 * values[0]
        largest = xp.max(xp.abs(values))
        lost = xp.abs(values) <= n * rounding(backend, flat) * largest
        failure = xp.where(
            xp.any(lost),
            int(Failure.SINGULAR),
            xp.where((lowest < 0) & system.definite, int(Failure.NEGATIVE_CURVATURE), int(Failure.NONE)),
        )
        inverse = xp.where(lost, 0.0 * values, 1.0 / xp.where(lost, largest + 1.0, values))
        x = vectors.add(backend, system.x, unravel(right @ (inverse * (left @ flat))))
        return Solution(x, n, n + system.spent, failure, largest, xp.min(xp.abs(values)))


def _blocks(backend: Backend, n: int) -> tuple[int, Any]:
    """How many columns to take side by side, and their places in a block: all in one where none is mapped."""
    side = n if not backend.compiles else -(-n // -(-n // _SIDE_BY_SIDE))
    return side, backend.stack(list(range(side)))
