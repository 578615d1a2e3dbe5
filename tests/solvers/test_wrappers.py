"""Solvers made of a solver: which ones go around which, and what they do together."""

import itertools

import numpy as np
import pytest
from support.arrays import arrays, numbers
from support.frameworks import each_backend, program
from support.known import Logistic

import hypergrad as hg
from hypergrad.errors import ArgumentError
from hypergrad.solvers import System

WRAPPERS = {
    "Warm": hg.Warm,
    "UntilAccurate": lambda solver: hg.UntilAccurate(solver, 1e-2),
    "Damped": lambda solver: hg.Damped(solver, 1e-3),
    "LevenbergMarquardt": hg.LevenbergMarquardt,
}
PAIRS = {
    ("Warm", "UntilAccurate"),
    ("Warm", "Damped"),
    ("Warm", "LevenbergMarquardt"),
    ("UntilAccurate", "Damped"),
    ("UntilAccurate", "LevenbergMarquardt"),
}
"""Outside and inside; all other pairs are refused."""

FINISHING = [
    hg.CG(),
    hg.MINRES(),
    hg.GMRES(),
    hg.BiCGStab(),
    hg.Neumann(rtol=1e-3),
    hg.Direct(),
    hg.CG(5, rtol=None),
]


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(WRAPPERS, WRAPPERS)), ids=str)
def test_the_order_of_wrappers(outer, inner):
    within = WRAPPERS[inner](hg.CG())
    if (outer, inner) in PAIRS:
        assert WRAPPERS[outer](within).solver == within
    else:
        with pytest.raises(ArgumentError, match="order"):
            WRAPPERS[outer](within)


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("solver", FINISHING, ids=repr)
def test_solvers_that_end_go_into_every_wrapper(outer, solver):
    assert WRAPPERS[outer](solver).core == solver


@each_backend
@pytest.mark.parametrize("inside", [hg.CG(), hg.Damped(hg.CG(), 0.5)], ids=repr)
def test_a_warm_solve_needs_nobody_to_prepare_it(backend, inside):
    solver, v = hg.Warm(inside), backend.asarray(np.array([1.0, -2.0, 0.5]))
    h = backend.asarray(np.array([1.0, 2.0, 4.0]))
    system = System(backend, lambda p: h * p, v)
    first = solver.solve(system, solver.init(backend, v))
    again = solver.solve(system, first.memory)
    assert int(first.iterations) == 3 and int(again.iterations) == 0
    shift = 0.5 if inside != hg.CG() else 0.0
    np.testing.assert_allclose(
        backend.to_numpy(again.x), np.array([1.0, -2.0, 0.5]) / ([1.0, 2.0, 4.0] + np.array(shift)), rtol=1e-6
    )


@pytest.mark.parametrize("solver", [hg.Amortised(0.1), hg.Neumann(fresh=True)], ids=repr)
@pytest.mark.parametrize("outer", ["UntilAccurate", "LevenbergMarquardt"])
def test_solvers_that_never_end_go_into_no_wrapper_that_waits(outer, solver):
    with pytest.raises(ArgumentError, match=outer):
        WRAPPERS[outer](solver)


def test_what_is_no_solver_is_refused():
    with pytest.raises(ArgumentError, match="hg.CG"):
        hg.Warm("cg")
    with pytest.raises(ArgumentError, match="last x"):
        hg.Warm(hg.Amortised(0.1))
    with pytest.raises(ArgumentError, match="damping"):
        hg.Damped(hg.CG(), -1.0)


@each_backend
class TestTogether:
    """Every legal composition solves the same damped system."""

    def estimate(self, backend, solver, state=None):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        estimator = hg.Implicit(solver)
        state = state or estimator.init(told.problem(backend), theta, lam, backend=backend)
        return estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)

    def exact(self, delta):
        told = Logistic()
        theta = told.optimum(told.lam)
        damped = told.hessian(theta, told.lam) + delta * np.eye(len(theta))
        return -theta * np.linalg.solve(damped, told.outer_slope(theta))

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda s: hg.Damped(s, 0.3),
            lambda s: hg.UntilAccurate(hg.Damped(s, 0.3), 1e-8),
            lambda s: hg.Warm(hg.Damped(s, 0.3)),
            lambda s: hg.Warm(hg.UntilAccurate(hg.Damped(s, 0.3), 1e-8)),
        ],
        ids=["damped", "until", "warm", "all"],
    )
    @pytest.mark.parametrize("solver", [hg.CG(rtol=1e-10), hg.GMRES(rtol=1e-10)], ids=repr)
    def test_damping_is_in_every_order(self, backend, wrap, solver):
        out = self.estimate(backend, wrap(solver))
        np.testing.assert_allclose(numbers(backend, out.hypergradient), self.exact(0.3), rtol=1e-7)
        assert float(out.report.solve.shift) == 0.3
        assert float(out.report.solve.residual) < 1e-5

    def test_a_search_for_damping_ends_with_an_accurate_solve(self, backend):
        solver = hg.Warm(hg.UntilAccurate(hg.LevenbergMarquardt(hg.CG(rtol=1e-10), initial=0.3), 1e-8))
        first = self.estimate(backend, solver)
        np.testing.assert_allclose(numbers(backend, first.hypergradient), self.exact(0.3), rtol=1e-7)
        assert float(first.report.solve.error) <= 1e-8
        second = self.estimate(backend, solver, first.state)
        assert float(second.report.solve.shift) == pytest.approx(0.03)
        np.testing.assert_allclose(numbers(backend, second.hypergradient), self.exact(0.03), rtol=1e-7)

    def test_an_amortised_solve_may_be_damped(self, backend):
        solver = hg.Damped(hg.Amortised(0.02), 0.3)
        out = self.estimate(backend, solver)
        again = program(backend, lambda state: self.estimate(backend, solver, state))
        for _ in range(600):
            out = again(out.state)
        np.testing.assert_allclose(numbers(backend, out.hypergradient), self.exact(0.3), rtol=1e-3)

    def test_terms_on_fresh_batches_are_damped_too(self, backend):
        solver = hg.Damped(hg.Neumann(2000, 0.02, fresh=True), 0.3)
        out = self.estimate(backend, solver)
        np.testing.assert_allclose(numbers(backend, out.hypergradient), self.exact(0.3), rtol=1e-6)

    def test_until_accurate_reports_the_curvatures_that_all_its_blocks_met(self, backend):
        """They go on in the directions of one solve, so they meet what that meets."""
        blocks, once = (
            self.estimate(backend, solver).report.solve
            for solver in (hg.UntilAccurate(hg.CG(rtol=1e-10), 1e-8), hg.CG(rtol=1e-10))
        )
        assert int(blocks.iterations) == int(once.iterations)
        assert float(blocks.curvature) == pytest.approx(float(once.curvature), rel=1e-6)
        assert float(blocks.smallest_curvature) == pytest.approx(float(once.smallest_curvature), rel=1e-6)

    def test_the_residual_of_a_solve_for_its_own_sake_is_that_of_the_damped_system(self, backend):
        v = np.array([1.0, 2.0])
        solution = hg.solve(lambda p: 3.0 * p, backend.asarray(v), hg.Damped(hg.CG(), 1.0), backend=backend)
        np.testing.assert_allclose(numbers(backend, solution.x), v / 4, rtol=1e-10)
        assert float(solution.residual) < 1e-10 and float(solution.shift) == 1.0
        with pytest.raises(ArgumentError, match="hg.solve"):
            hg.solve(lambda p: 3.0 * p, backend.asarray(v), hg.UntilAccurate(hg.CG(), 1e-2), backend=backend)
