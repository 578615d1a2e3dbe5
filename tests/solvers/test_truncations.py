"""Solvers with ``rtol=None``: so many products, and no promise."""

import numpy as np
import pytest
from support.arrays import arrays, numbers
from support.frameworks import each_backend, program
from support.known import Logistic
from support.random_systems import definite

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.errors import ArgumentError, SolveError
from hypergrad.solvers import System

KRYLOV = [hg.CG, hg.MINRES, hg.GMRES, hg.BiCGStab]
each_krylov = pytest.mark.parametrize("kind", KRYLOV, ids=lambda kind: kind.__name__)


@each_backend
class TestTruncations:
    @each_krylov
    @pytest.mark.parametrize("compiled", [False, True])
    def test_they_take_their_products_and_promise_nothing(self, backend, kind, compiled):
        told = Logistic(n=8)
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        estimator = hg.Implicit(kind(4, rtol=None))
        state = estimator.init(told.problem(backend), theta, lam, backend=backend)

        def estimate(lam):
            return estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)

        out = (program(backend, estimate) if compiled else estimate)(lam)
        assert int(out.report.solve.products) == 4 and int(out.report.solve.failure) == 0
        assert 1e-6 < float(out.report.solve.residual) < 1
        promised = hg.Implicit(kind(4))
        with pytest.raises(SolveError) as error:
            hg.hypergradient(
                told.problem(backend), theta, lam, *told.data(backend), promised, backend=backend
            )
        assert error.value.reason == "max_steps"

    def test_conjugate_gradients_are_those_of_the_promise_until_they_stop(self, backend):
        a, v, _ = definite(9, 30.0)
        matrix, v = arrays(backend, a, v)
        short = hg.solve(lambda p: matrix @ p, v, hg.CG(3, rtol=None), backend=backend)
        with pytest.raises(SolveError) as error:
            hg.solve(lambda p: matrix @ p, v, hg.CG(3, rtol=1e-12), backend=backend)
        assert float(short.residual) == pytest.approx(error.value.residual, rel=1e-10)

    @each_krylov
    def test_the_iterate_is_held_once_it_is_right(self, backend, kind):
        v = np.array([1.0, -2.0, 4.0])
        solution = hg.solve(lambda p: 2.0 * p, backend.asarray(v), kind(40, rtol=None), backend=backend)
        np.testing.assert_allclose(numbers(backend, solution.x), v / 2, rtol=1e-14)

    @each_krylov
    def test_nothing_is_held_at_nothing(self, backend, kind):
        solution = hg.solve(
            lambda p: 2.0 * p, backend.asarray(np.zeros(3)), kind(5, rtol=None), backend=backend
        )
        assert not numbers(backend, solution.x).any()

    def test_only_too_few_steps_are_waived(self, backend):
        bent, flat = arrays(backend, np.array([1.0, -1.0]), np.array([1.0, 0.0]))
        one = backend.asarray(np.ones(2))
        for diagonal, reason in ((bent, "negative_curvature"), (flat, "singular")):
            with pytest.raises(SolveError) as error:
                hg.solve(lambda p, d=diagonal: d * p, one, hg.CG(5, rtol=None), backend=backend)
            assert error.value.reason == reason
        with pytest.raises(SolveError) as error:
            hg.solve(lambda p: 10.0 * p, one, hg.Neumann(20, step_size=1.0), backend=backend)
        assert error.value.reason == "diverged"


class TestSteps:
    @pytest.mark.parametrize(("n", "most"), [(3, 6), (200, 400), (10**6, 1000)])
    def test_conjugate_gradients_take_twice_as_many_as_there_are_unknowns(self, n, most):
        assert hg.CG().limit(System(get_backend("numpy"), lambda p: p, np.zeros(n))) == most
        assert hg.CG(7).limit(System(get_backend("numpy"), lambda p: p, np.zeros(n))) == 7

    def test_a_derivative_takes_another_solve_where_steps_cannot_be_differentiated(self):
        assert hg.CG(5, rtol=None).truncates is True and hg.CG(5).truncates is False
        assert hg.External(lambda product, v: v).truncates is False

    @each_krylov
    def test_a_tolerance_of_nothing_is_spelled_none(self, kind):
        with pytest.raises(ArgumentError, match="None"):
            kind(5, rtol=0.0)
