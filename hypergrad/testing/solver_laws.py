"""The laws that every solver obeys, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers import Solver, System
from hypergrad.solvers.system import Solution
from hypergrad.testing.problems import close

_N = 6
"""Unknowns: 2 × 2 in one leaf and 2 in another."""
_SPECTRA = (
    np.linspace(1.0, 3.0, _N),
    np.logspace(0.0, 3.0, _N),
    np.array([1e-6, 1.0, 1.0, 2.0, 2.0, 1e2]),
)
"""Eigenvalues of symmetric positive definite matrices, from easy to hard."""


def _matrix(eigenvalues: Any) -> Any:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(_N, _N)))
    return q @ np.diag(eigenvalues) @ q.T


def _tree(backend: Backend, values: Any, dtype: Any = float) -> Tree:
    values = np.asarray(values, dtype)
    return {"w": backend.asarray(values[:4].reshape(2, 2)), "b": backend.asarray(values[4:])}


def _flat(backend: Backend, tree: Tree) -> Any:
    return np.concatenate([backend.to_numpy(tree["w"]).ravel(), backend.to_numpy(tree["b"])])


def _right_side() -> Any:
    return np.random.default_rng(1).normal(size=_N)


class _Solved(NamedTuple):
    """A solution, the relative residual that was promised, and the products that were taken."""

    solution: Solution
    target: float
    products: int


def _solve(
    backend: Backend, solver: Solver, eigenvalues: Any, v: Any, dtype: Any = float, x: Any = None
) -> _Solved:
    """Solve as the library does, from the solver's own memory."""
    matrix, products = backend.asarray(_matrix(eigenvalues).astype(dtype)), [0]

    def product(p: Tree) -> Tree:
        products[0] += 1
        flat, unravel = backend.ravel(p)
        return unravel(matrix @ flat)

    start = None if x is None else _tree(backend, x, dtype)
    resampled = (lambda p, k: product(p)) if solver.resamples else None
    system = System(backend, product, _tree(backend, v, dtype), x=start, resampled=resampled)
    memory = solver.init(backend, system.v)
    prepared = solver.prepared(system, memory)
    solution = solver.solve(prepared, memory)
    size = float(np.linalg.norm(v)) or 1.0
    return _Solved(solution, float(backend.to_numpy(solver.target(prepared))) / size, products[0])


def _order(backend: Backend, v: Any) -> Any:
    """Return a vector in the order in which the backend ravels a tree."""
    return backend.to_numpy(backend.ravel(_tree(backend, v))[0])


def _residual(backend: Backend, eigenvalues: Any, v: Any, solution: Solution) -> float:
    """Return ‖(A + δI) x − v‖ / ‖v‖, in NumPy, for the shift δ of the solution."""
    shift = 0.0 if solution.shift is None else float(backend.to_numpy(solution.shift))
    x = backend.to_numpy(backend.ravel(solution.x)[0])
    left = _order(backend, v) - _matrix(eigenvalues) @ x - shift * x
    return float(np.linalg.norm(left) / np.linalg.norm(v))


def a_success_is_one(backend: Backend, solver: Solver) -> None:
    """Where a solver reports no failure, the true residual ‖Ax − v‖ meets the target that it promises.

    Holds on easy systems and on hard ones. Catches a solver that believes its own recurrence.
    """
    for eigenvalues in _SPECTRA:
        v = _right_side()
        solution, target, _ = _solve(backend, solver, eigenvalues, v)
        if not solver.promises_nothing and int(solution.failure) == Failure.NONE:
            found = _residual(backend, eigenvalues, v, solution)
            # A solver measures the residual of its own x, up to a few roundings of A x.
            assert found <= 1.01 * target + 1e-14 * eigenvalues.max() / eigenvalues.min()


def easy_systems_are_solved(backend: Backend, solver: Solver) -> None:
    """A well-conditioned symmetric positive definite system is solved, if the solver promises a residual."""
    if solver.promises_nothing:
        return
    solution, target, _ = _solve(backend, solver, _SPECTRA[0], _right_side())
    assert int(solution.failure) == Failure.NONE
    assert _residual(backend, _SPECTRA[0], _right_side(), solution) <= 1.01 * target


def unsolvable_systems_are_failures(backend: Backend, solver: Solver) -> None:
    """A singular system without a solution is never a success, if the solver promises a residual."""
    if solver.promises_nothing or solver.core is not solver:  # a wrapper may solve another system
        return
    singular = np.array([0.0, 0.0, 1.0, 1.0, 2.0, 3.0])
    solution = _solve(backend, solver, singular, _right_side()).solution
    assert int(solution.failure) != Failure.NONE


def products_are_counted(backend: Backend, solver: Solver) -> None:
    """The reported number of products is the number of products taken, where no compiler repeats them."""
    if backend.compiles:
        return
    solution, _, products = _solve(backend, solver, _SPECTRA[0], _right_side())
    assert int(solution.products) == products


def solutions_are_homogeneous(backend: Backend, solver: Solver) -> None:
    """Four times the right-hand side has four times the solution."""
    one = _solve(backend, solver, _SPECTRA[0], _right_side())
    four = _solve(backend, solver, _SPECTRA[0], 4.0 * _right_side())
    rtol = 1e-8 + (0.0 if solver.promises_nothing else 20.0 * one.target)
    close(backend, four.solution.x, vectors.scale(backend, 4.0, one.solution.x), rtol)


def a_right_side_of_zero_has_the_solution_zero(backend: Backend, solver: Solver) -> None:
    """For v = 0 the solution is 0, without a failure."""
    solution = _solve(backend, solver, _SPECTRA[0], np.zeros(_N)).solution
    assert int(solution.failure) == Failure.NONE
    close(backend, solution.x, _tree(backend, np.zeros(_N)), 0.0)


def solutions_have_the_form_of_the_right_side(backend: Backend, solver: Solver) -> None:
    """Structure, shapes and dtypes of x are those of v, in float32, too."""
    for dtype in ("float64", "float32"):
        solution = _solve(backend, solver, _SPECTRA[0], _right_side(), dtype).solution
        assert backend.form(solution.x) == backend.form(_tree(backend, np.zeros(_N), dtype))


def solves_are_pure(backend: Backend, solver: Solver) -> None:
    """The right-hand side does not change, and the same system has the same solution."""
    first, second = (_solve(backend, solver, _SPECTRA[1], _right_side()).solution for _ in range(2))
    close(backend, first.x, second.x, 0.0)


def a_start_is_one(backend: Backend, solver: Solver) -> None:
    """A solve that starts from the solution ends there, if the solver promises a residual."""
    if solver.promises_nothing or solver.core is not solver:
        return
    v = _right_side()
    flat = np.linalg.solve(_matrix(_SPECTRA[0]), _order(backend, v))
    tree = backend.ravel(_tree(backend, v))[1](backend.asarray(flat))
    start = _flat(backend, tree)
    solution, target, _ = _solve(backend, solver, _SPECTRA[0], v, x=start)
    assert int(solution.failure) == Failure.NONE
    assert _residual(backend, _SPECTRA[0], v, solution) <= 1.01 * target + 1e-14


SOLVER_LAWS: tuple[Callable[[Backend, Solver], None], ...] = (
    a_success_is_one,
    easy_systems_are_solved,
    unsolvable_systems_are_failures,
    products_are_counted,
    solutions_are_homogeneous,
    a_right_side_of_zero_has_the_solution_zero,
    solutions_have_the_form_of_the_right_side,
    solves_are_pure,
    a_start_is_one,
)
