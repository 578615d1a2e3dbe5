"""Solvers of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from hypergrad.backend import Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.solvers.base import Solver, check_tolerance
from hypergrad.solvers.system import Solution, System


@final
@dataclass(frozen=True)
class External(Solver):
    r"""Call any function ``solve(matvec, v) -> x`` on flat vectors, such as one of SciPy's or lineax's.

        def scipy_cg(matvec, v):
            operator = scipy.sparse.linalg.LinearOperator((v.size, v.size), matvec)
            return scipy.sparse.linalg.cg(operator, v, rtol=1e-8)[0]

        hg.Implicit(hg.External(scipy_cg, rtol=1e-6, on_host=True))

    The function's own report of success is ignored: the true residual is measured.

    Args:
        solve_fn: takes p -> A p and v, vectors of the framework, and returns x.
        rtol: the relative residual ‖Ax − v‖/‖v‖ above which a solution counts as failed.
        atol: the same for the absolute residual; meeting ``rtol`` or ``atol`` is enough. Without either the
            solver promises nothing.
        on_host: pass NumPy vectors, whatever the framework; not possible in a compiled program.

    Raises:
        ArgumentError: if ``solve_fn`` is not a function; when used, if it returns a shape other than v's, or
            if values cannot be read for ``on_host``.
    """

    solve_fn: Callable[[Callable[[Any], Any], Any], Any]
    rtol: float | None = None
    atol: float = 0.0
    on_host: bool = False

    def __post_init__(self) -> None:
        check_tolerance("External", self.rtol, self.atol)
        if not callable(self.solve_fn):
            raise ArgumentError(f"External: {self.solve_fn!r} is not a function solve(matvec, v) -> x")

    @property
    def truncates(self) -> bool:
        """False: derivatives take another solve, even if this one promises nothing."""
        return False

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = system.begun()
        backend = system.backend
        flat, unravel = backend.ravel(system.r)
        if self.on_host and not backend.readable(flat):
            raise ArgumentError(
                "External: on_host=True passes NumPy vectors, and a compiled program has none: use a solver "
                "of the framework, or do not compile"
            )
        count = 0

        def matvec(p: Any) -> Any:
            nonlocal count
            p = backend.asarray(np.asarray(p), like=flat) if self.on_host else p
            product, _ = backend.ravel(system.product(unravel(p)))
            count += 1
            return backend.to_numpy(product) if self.on_host else product

        x = self.solve_fn(matvec, backend.to_numpy(flat) if self.on_host else flat)
        if np.shape(x) != np.shape(flat):
            raise ArgumentError(f"External: solve returned shape {np.shape(x)}, but v has {np.shape(flat)}")
        x = backend.asarray(np.asarray(x), like=flat) if self.on_host else x
        # In a compiled program the number of calls in a loop is unknown.
        spent = count if backend.readable(flat) else float("nan")
        return Solution(vectors.add(backend, system.x, unravel(x)), spent, spent + system.spent)
