"""`UntilAccurate`, block by block, around a solver whose iterates are prescribed."""

from dataclasses import dataclass

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.errors import Failure
from hypergrad.solvers.system import Image, Solution, System

NUMPY = get_backend("numpy")
A, B, C = np.array([1.0, 2.0, 4.0]), np.array([[1.0, -1.0, 2.0], [0.5, 3.0, -1.0]]), np.array([0.3, -0.2])
V = np.array([1.0, -2.0, 3.0])
EXACT = V / A


@dataclass(frozen=True)
class Prescribed(hg.Solver):
    """A solver that takes ``length`` blocks from 0 to each of the given x, and then fails."""

    iterates: tuple[tuple[float, ...], ...]
    length: int
    last: Failure = Failure.NEGATIVE_CURVATURE
    curvatures: tuple[float, ...] = (4.0,) * 9
    smallest: tuple[float, ...] = (1.0,) * 9

    def solve(self, system, memory=None):
        k = [(0.0, 0.0, 0.0), *self.iterates].index(tuple(system.x))
        return Solution(
            np.array(self.iterates[k]),
            iterations=2,
            products=3,
            failure=int(self.last if k + 1 == self.length else Failure.NONE),
            curvature=self.curvatures[k],
            smallest=self.smallest[k],
        )


def solve(solver, accuracy=1e-6, **more):
    system = System(NUMPY, lambda p: A * p, V, both=lambda x: Image(A * x, B @ x), direct=C, **more)
    return hg.UntilAccurate(solver, accuracy).solve(system)


def away(*lengths, along=((1.0, 0.2, 0.3), (0.1, 1.0, -0.4))):
    """Return iterates so far from the solution, along two directions in turn."""
    return tuple(tuple(EXACT + e * np.array(along[k % 2])) for k, e in enumerate(lengths))


def expected(iterates):
    """Return the estimated relative error after the last iterate, by the formula of the docstring."""
    x = [np.zeros(3), *map(np.array, iterates)]
    g = [C - B @ at for at in x]
    r = [np.linalg.norm(V - A * at) for at in x]
    d = [np.inf, *(np.linalg.norm(after - before) for before, after in zip(g[:-1], g[1:], strict=True))]
    rho = min(max(r[-1] / r[-2], d[-1] / d[-2]), 0.9)
    return max(1, rho / (1 - rho)) * max(d[-1], d[-2] / 10) / np.linalg.norm(g[-1])


SCRIPTS = {
    "steady": away(0.3, 0.03, 0.003, 0.0003),
    "slow": away(0.5, 0.4, 0.3, 0.25),
    "slower and slower": away(0.5, 0.05, 0.03, 0.027, 0.025),
    "a small change": away(0.4, 0.3999, 0.39989, 0.2, 0.02),
    "a large one": away(0.01, 0.5, 0.005, 0.3),
    "growing": away(0.01, 0.1, 0.2, 0.3),
    "nearly there": away(1e-3, 0.9e-3, 1e-5, 0.9e-5),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_error_is_estimated_by_the_changes(name):
    iterates = SCRIPTS[name]
    assert solve(Prescribed(iterates, 1)).error == np.inf  # one change is no estimate
    for blocks in range(2, len(iterates) + 1):
        solution = solve(Prescribed(iterates, blocks))
        np.testing.assert_array_equal(solution.x, iterates[blocks - 1])
        np.testing.assert_allclose(solution.error, expected(iterates[:blocks]), rtol=1e-9)
        assert solution.failure == Failure.NEGATIVE_CURVATURE


def test_it_stops_at_the_first_block_that_is_accurate_enough():
    iterates = SCRIPTS["steady"]
    errors = [np.inf] + [expected(iterates[:k]) for k in range(2, 5)]
    assert sorted(errors, reverse=True) == errors
    for blocks in range(2, 5):
        solution = solve(Prescribed(iterates, 9), accuracy=errors[blocks - 1] * 1.001)
        np.testing.assert_array_equal(solution.x, iterates[blocks - 1])
        assert solution.failure == Failure.NONE
        assert solution.iterations == 2 * blocks
        assert solution.products == 1 + 4 * blocks  # B x of the start, and after each block


def test_a_failure_after_an_accurate_block_is_none():
    iterates = SCRIPTS["steady"]
    assert solve(Prescribed(iterates, 4), accuracy=0.5).failure == Failure.NONE


def test_a_block_that_ran_out_of_steps_goes_on_if_it_halved_the_residual():
    halved, stuck = away(0.5, 0.1, 0.01, 0.001), away(0.5, 0.1, 0.09, 0.001)
    for length in (2, 3):
        solution = solve(Prescribed(halved, length, Failure.MAX_STEPS), accuracy=1e-2)
        np.testing.assert_array_equal(solution.x, halved[3])
    solution = solve(Prescribed(stuck, 3, Failure.MAX_STEPS), accuracy=1e-2)
    np.testing.assert_array_equal(solution.x, stuck[2])
    assert solution.failure == Failure.MAX_STEPS


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (2, 1, 3)])
def test_the_curvatures_are_the_extremes_of_all_blocks(order):
    iterates = SCRIPTS["slow"]
    told = tuple(float(x) for x in order)
    solution = solve(Prescribed(iterates, 3, curvatures=told, smallest=told))
    assert (solution.curvature, solution.smallest) == (3.0, 1.0)


def test_what_is_known_of_the_curvature_before_it_counts():
    solver = Prescribed(SCRIPTS["slow"], 2, curvatures=(2.0, 3.0))
    assert solve(solver).curvature == 3.0
    assert solve(solver, curvature=5.0).curvature == 5.0


def test_an_exact_first_block_is_bounded_by_its_rounding():
    """There is no second change, but ‖δx‖/‖x‖ ≤ ‖r‖/(σ ‖x‖)."""
    off = tuple(EXACT * (1 + np.array([3e-16, -3e-16, 5e-16])))
    solution = solve(Prescribed((off,), 9, smallest=(0.5,)))
    residual = np.linalg.norm(V - A * np.array(off))
    assert residual > 0
    assert solution.failure == Failure.NONE
    np.testing.assert_allclose(solution.error, residual / (0.5 * np.linalg.norm(off)), rtol=1e-9)


def test_a_solver_without_curvatures_bounds_nothing():
    exact = (tuple(EXACT),)
    solution = solve(Prescribed(exact, 9, smallest=(float("nan"),)))
    assert solution.failure == Failure.NONE
    assert np.isnan(solution.smallest)
    assert np.isnan(solution.error)
