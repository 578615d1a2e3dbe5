"""Solvers on numbers, where the scalars of a framework cost more than they are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeVar, cast, final

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.solvers.system import Solution, System

Solve = TypeVar("Solve", bound=Callable[..., Solution])
"""(solver, system, …) -> solution."""


class _NoNumber(Exception):
    """A scalar that cannot be read now, or of which a derivative may be asked for."""


@final
class Numbers:
    """A backend whose scalars are NumPy's, of the same precision; all else is that of the backend given."""

    xp = SimpleNamespace(
        abs=abs,
        finfo=np.finfo,
        isfinite=np.isfinite,
        maximum=np.maximum,
        minimum=np.minimum,
        ones_like=lambda x: type(x)(1),
        sqrt=np.sqrt,
        where=lambda condition, x, y: x if condition else y,
    )

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def number(self, x: Scalar) -> Scalar:
        """Read a scalar, or give up."""
        if (value := self._backend.number(x)) is None:
            raise _NoNumber
        return value

    def inner(self, x: Tree, y: Tree) -> Scalar:
        if (value := self._backend.number(self._backend.inner(x, y))) is None:
            raise _NoNumber
        return value

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        return self._backend.axpy(float(a), x, y)


def on_numbers(solve: Solve) -> Solve:
    """Read the inner products of a solver as they come, and let it compute with numbers, where that can be.

    An operation on a scalar takes an eager framework 2 to 4 µs, of which a step of `CG` would make thirty,
    and with numbers a tenth of one. Where a number is not to be had, because a program is being made, it lies
    on a device, or a derivative goes through it, the solver works on scalars: it is written for both. What
    only the first product shows is found out by that, which is then taken twice.
    """

    @wraps(solve)
    def on_numbers_where_readable(solver: Any, system: System, *rest: Any) -> Solution:
        backend = system.backend
        if backend.compiles or not backend.readable(*backend.flatten(system.r)[0]):
            return solve(solver, system, *rest)
        told, numbers = np.geterr(), Numbers(backend)

        def product(p: Tree) -> Tree:
            with np.errstate(**told):
                return system.product(p)

        try:
            goal = None if system.goal is None else numbers.number(system.goal)
            readable = replace(
                system,
                backend=cast(Backend, numbers),
                product=product,
                goal=goal,
                met=numbers.number(system.met),
            )
            # A framework's scalars overflow in silence, and what came of it shows in the residual.
            with np.errstate(all="ignore"):
                solution = solve(solver, readable, *rest)
        except _NoNumber:
            return solve(solver, system, *rest)
        like = backend.inner(system.r, system.r)
        curvature, smallest = (backend.asarray(x, like=like) for x in (solution.curvature, solution.smallest))
        return solution._replace(curvature=curvature, smallest=smallest)

    return cast(Solve, on_numbers_where_readable)
