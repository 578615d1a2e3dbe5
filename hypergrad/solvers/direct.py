"""Dense solves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Solver, check_count, check_tolerance, rounding
from hypergrad.solvers.system import Solution, System

_MAX_BLOCK = 64


@final
@dataclass(frozen=True)
class Direct(Solver):
    r"""Form H from n products and solve by its eigenvalues, x = Q Λ⁻¹ Qᵀ v, or by its singular values.

    For small problems and as a reference: n products, n² numbers in memory, O(n³) time. A framework that can
    vectorise computes up to 64 products in parallel, and needs the memory of as many. Where an eigenvalue or
    singular value is within rounding error of 0, relative to the largest, x is the smallest solution, as
    `CG` finds it. The solve fails with ``singular`` if there is none: if v has a part along such a vector
    above ``rtol``. It fails with ``negative_curvature`` if an eigenvalue of a symmetric H is negative.

    Args:
        max_unknowns: the largest n that is accepted.
        rtol: the relative residual above which a solution counts as failed.

    Raises:
        ArgumentError: for more unknowns than ``max_unknowns``, with the size of the matrix.
    """

    has_residual: ClassVar[bool] = True

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

        width, offsets = _blocks(backend, n)

        def block(_: tuple[()], k: Any, __: Any) -> tuple[tuple[()], Any]:
            def column(i: Any) -> Any:
                return backend.ravel(system.product(unravel(identity[k * width + i])))[0]

            return (), backend.dense(backend.each(column, offsets))

        _, rows = backend.scan(block, (), -(-n // width))
        matrix = xp.reshape(backend.dense(rows), (-1, n))[:n].T
        # Non-finite entries are reported elsewhere; LAPACK may fail on them.
        matrix = xp.where(xp.isfinite(matrix), matrix, 0.0 * identity)
        if system.symmetric:
            values, q = xp.linalg.eigh(0.5 * (matrix + matrix.T))
            left, right, lowest = q.T, q, xp.min(values)
        else:
            u, values, right = xp.linalg.svd(matrix)
            left, right, lowest = u.T, right.T, 0.0 * values[0]
        largest = xp.max(xp.abs(values))
        floor = n * rounding(backend, flat) * largest
        negligible = xp.abs(values) <= floor
        along = left @ flat
        lost = xp.where(negligible, along, 0.0 * along)
        failure = xp.where(
            xp.sqrt(xp.sum(lost * lost)) > self.target(system),
            int(Failure.SINGULAR),
            xp.where((lowest < -floor) & system.definite, int(Failure.NEGATIVE_CURVATURE), int(Failure.NONE)),
        )
        inverse = xp.where(negligible, 0.0 * values, 1.0 / xp.where(negligible, largest + 1.0, values))
        x = vectors.add(backend, system.x, unravel(right @ (inverse * along)))
        return Solution(x, n, n + system.spent, failure, largest, xp.min(xp.abs(values)))


def _blocks(backend: Backend, n: int) -> tuple[int, Any]:
    """Return the size of a block of columns, and the offsets in it: one block if nothing is compiled."""
    width = n if not backend.compiles else -(-n // -(-n // _MAX_BLOCK))
    return width, backend.stack(list(range(width)))
