"""`FixedPoint`: maps without a loss, by every estimator."""

from __future__ import annotations

import numpy as np
import pytest
from support.arrays import numbers
from support.frameworks import each_backend
from support.known import equilibrium

import hypergrad as hg
from hypergrad.errors import ArgumentError


@each_backend
class TestFixedPoint:
    @pytest.mark.parametrize(
        "solver",
        [hg.GMRES(rtol=1e-10), hg.BiCGStab(200, rtol=1e-10), hg.Neumann(200, rtol=1e-10), hg.Direct()],
        ids=str,
    )
    def test_an_equilibrium_layer(self, backend, solver):
        problem, theta, lam, u, y, exact = equilibrium(backend)
        estimator = hg.Implicit(solver)
        state = estimator.init(problem, backend.asarray(theta), lam, backend=backend)
        out = estimator.estimate(problem, state, lam, u, y, backend=backend)
        np.testing.assert_allclose(numbers(backend, out.hypergradient), exact, rtol=1e-6, atol=1e-9)
        assert float(out.inner_value) <= 1e-12

    def test_an_unroll_of_its_iterations_comes_to_the_same(self, backend):
        problem, theta, lam, u, y, exact = equilibrium(backend)
        estimator = hg.Unrolled(hg.SGD(1.0), steps=60)
        found = hg.hypergradient(
            problem, backend.asarray(0 * theta), lam, lambda t: u, y, estimator, backend=backend
        )
        np.testing.assert_allclose(numbers(backend, found), exact, rtol=1e-6, atol=1e-9)

    def test_neumann_is_the_truncated_unroll_at_the_fixed_point(self, backend):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        estimators = hg.Unrolled(hg.SGD(1.0), steps=7), hg.Implicit(hg.Neumann(7))
        found = [
            hg.hypergradient(problem, backend.asarray(theta), lam, lambda t: u, y, e, backend=backend)
            for e in estimators
        ]
        np.testing.assert_allclose(*(numbers(backend, g) for g in found), rtol=1e-9, atol=1e-12)

    def test_greedy_is_the_last_iteration_alone(self, backend):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        found = [
            hg.hypergradient(problem, backend.asarray(theta), lam, u, y, e, backend=backend)
            for e in (hg.Greedy(hg.SGD(1.0)), hg.Implicit(hg.Identity()))
        ]
        np.testing.assert_allclose(*(numbers(backend, g) for g in found), rtol=1e-9, atol=1e-12)

    def test_a_check_solves_it_again(self, backend):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        check = hg.check_hypergradient(
            problem, backend.asarray(theta), lam, u, y, hg.Implicit(hg.GMRES(rtol=1e-10)),
            directions=2, backend=backend,
        )  # fmt: skip
        assert check.relative_error <= 1e-6
        assert check.exact_relative_error <= 1e-8

    def test_conjugate_gradients_are_refused(self, backend):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        with pytest.raises(ArgumentError, match=r"hg\.GMRES"):
            hg.hypergradient(problem, backend.asarray(theta), lam, u, y, hg.Implicit(), backend=backend)

    @pytest.mark.parametrize(
        "products",
        [hg.FiniteDifference(), hg.GaussNewton(lambda p, h, b: p, lambda f, h, b: f @ f)],
        ids=["differences", "Gauss-Newton"],
    )
    def test_what_needs_a_loss_is_refused(self, backend, products):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        implicit = hg.Implicit(hg.GMRES(), products=products)
        with pytest.raises(ArgumentError, match="FixedPoint"):
            hg.hypergradient(problem, backend.asarray(theta), lam, u, y, implicit, backend=backend)
        with pytest.raises(ArgumentError, match="FixedPoint"):
            hg.FixedPoint.of_update(problem, hg.SGD(0.1))

    def test_a_map_into_another_space_is_refused(self, backend):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        wrong = hg.FixedPoint(lambda p, h, b: p[:2], problem.outer)
        with pytest.raises(ArgumentError, match="shape"):
            hg.hypergradient(
                wrong, backend.asarray(theta), lam, u, y, hg.Implicit(hg.GMRES()), backend=backend
            )
