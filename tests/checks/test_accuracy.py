"""`UntilAccurate` and `error_bound`: how far a hypergradient is from the right one, as it knows itself."""

from __future__ import annotations

import numpy as np
import pytest
from support.arrays import arrays, numbers
from support.frameworks import affordable, each_backend
from support.known import Logistic

import hypergrad as hg
from hypergrad.errors import ArgumentError, SolveError


def ill_conditioned(backend, kappa, n=120, seed=0):
    """½ θᵀAθ − θᵀλ with a spectrum of condition number κ: x = A⁻¹v is the response itself."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = q @ np.diag(np.logspace(0, -np.log10(kappa), n)) @ q.T
    c = rng.normal(size=(n, 3))
    problem = hg.Bilevel(
        lambda p, h, b: 0.5 * backend.xp.sum(p * (b[0] @ p)) - backend.xp.sum(p * (b[1] @ h)),
        lambda p, h, b: backend.xp.sum(b * p),
    )
    lam, v = rng.normal(size=3), q @ rng.normal(size=n)
    theta = np.linalg.solve(a, c @ lam)
    exact = c.T @ np.linalg.solve(a, v)
    return problem, arrays(backend, theta, lam), arrays(backend, a, c), backend.asarray(v), exact


@each_backend
class TestAccuracy:
    @pytest.mark.parametrize("solver", [hg.CG(1000), hg.MINRES(1000), hg.GMRES(1000)], ids=str)
    @pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
    def test_the_error_is_that_of_the_hypergradient(self, backend, solver, tolerance):
        for kappa in affordable(backend, (10, 1e3), (1e3,)):
            problem, (theta, lam), train, val, exact = ill_conditioned(backend, kappa)
            estimator = hg.Implicit(hg.UntilAccurate(solver, tolerance))
            state = estimator.init(problem, theta, lam, backend=backend)
            out = estimator.estimate(problem, state, lam, train, val, backend=backend)
            error = np.linalg.norm(numbers(backend, out.hypergradient) - exact) / np.linalg.norm(exact)
            assert error <= tolerance
            assert float(out.report.solve.error) <= tolerance

    def test_it_costs_less_than_a_residual_to_be_safe(self, backend):
        problem, (theta, lam), train, val, _ = ill_conditioned(backend, 1e3)
        spent = []
        for estimator in (
            hg.Implicit(hg.UntilAccurate(hg.CG(1000), 1e-2)),
            hg.Implicit(hg.CG(1000, rtol=1e-8)),
        ):
            state = estimator.init(problem, theta, lam, backend=backend)
            out = estimator.estimate(problem, state, lam, train, val, backend=backend)
            spent.append(int(out.report.products))
        assert spent[0] < 0.7 * spent[1]

    def test_one_lucky_step_is_not_believed(self, backend):
        """The first tenth of the residual is along a direction that ∂_λ G does not see."""
        h, v, ones = arrays(backend, np.array([1.0, 1e-4]), np.array([1.0, 5e-3]), np.ones(2))
        problem = hg.Bilevel(
            lambda p, lam, b: 0.5 * backend.xp.sum(h * p * p) - backend.xp.sum(h * p) + (p[1] - 1.0) * lam,
            lambda p, lam, b: backend.xp.sum(v * p) + lam,
        )
        found = hg.hypergradient(
            problem,
            ones,
            backend.asarray(0.0),
            None,
            None,
            hg.Implicit(hg.UntilAccurate(hg.CG(), 1e-2)),
            backend=backend,
        )
        np.testing.assert_allclose(numbers(backend, found), -49.0, rtol=1e-2)

    def test_single_precision_goes_as_far_as_it_can(self, backend):
        problem, (theta, lam), train, val, exact = ill_conditioned(backend, 1e4, n=60)
        narrow = backend.map(lambda x: backend.cast(x, "float32"), (theta, lam, train, val))
        estimator = hg.Implicit(hg.UntilAccurate(hg.CG(2000), 1e-4), checks=hg.Checks(away="ignore"))
        found = hg.hypergradient(problem, *narrow, estimator, backend=backend)
        error = np.linalg.norm(numbers(backend, found) - exact) / np.linalg.norm(exact)
        assert error <= 1e-2  # κ ε is 1e-3 here, whatever is asked for

    def test_too_few_steps_are_a_failure(self, backend):
        problem, (theta, lam), train, val, _ = ill_conditioned(backend, 1e3)
        with pytest.raises(SolveError) as error:
            hg.hypergradient(
                problem,
                theta,
                lam,
                train,
                val,
                hg.Implicit(hg.UntilAccurate(hg.CG(2), 1e-6)),
                backend=backend,
            )
        assert error.value.reason == "max_steps"


@each_backend
class TestBound:
    @pytest.mark.parametrize("away", [0.0, 1e-3, 1e-2])
    @pytest.mark.parametrize("rtol", [1e-10, 1e-3, 1e-2])
    def test_it_is_above_the_error_and_of_its_order(self, backend, away, rtol):
        for seed in range(affordable(backend, 3, 1)):
            told = Logistic(seed=seed)
            best = told.optimum(told.lam)
            theta = best + away * np.random.default_rng(seed).normal(size=best.size)
            estimator = hg.Implicit(hg.CG(rtol=rtol), checks=hg.Checks(away="ignore"))
            state = estimator.init(told.problem(backend), *arrays(backend, theta, told.lam), backend=backend)
            out = estimator.estimate(
                told.problem(backend), state, backend.asarray(told.lam), *told.data(backend), backend=backend
            )
            given = told.problem(backend), *arrays(backend, theta, told.lam), *told.data(backend), estimator
            exact = told.hypergradient(best, told.lam)
            error = np.linalg.norm(numbers(backend, out.hypergradient) - exact)
            limit = float(hg.error_bound(*given, backend=backend))
            assert error <= limit + 1e-12
            lowest = np.linalg.eigvalsh(told.hessian(theta, told.lam))[0]
            assert lowest * (1 - 1e-6) <= float(out.report.solve.smallest_curvature)
            # It is no better than its constants: the condition number of H, and of ∂_λ G.
            assert limit <= 1e-6 + 300 * (away + rtol)

    @pytest.mark.parametrize(
        "solver",
        [hg.Damped(hg.CG(rtol=1e-8), 0.1), hg.Damped(hg.CG(rtol=1e-8), 1.0), hg.Warm(hg.CG(rtol=1e-8))],
        ids=str,
    )
    def test_it_is_above_the_error_of_a_damped_solve_or_says_nothing(self, backend, solver):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        given = told.problem(backend), theta, lam, *told.data(backend), hg.Implicit(solver)
        exact = told.hypergradient(told.optimum(told.lam), told.lam)
        error = np.linalg.norm(numbers(backend, hg.hypergradient(*given, backend=backend)) - exact)
        assert not float(hg.error_bound(*given, backend=backend)) < error

    @pytest.mark.parametrize(("shift", "known"), [(0.0, True), (0.5, True), (2.0, False), (5.0, False)])
    def test_curvatures_below_the_shift_are_unknown(self, backend, shift, known):
        """The solver meets 1 + δ, of which δ is known to the accuracy of the solve alone."""
        solver = hg.Damped(hg.CG(rtol=1e-10), shift) if shift else hg.CG(rtol=1e-10)
        h, v, one = arrays(backend, np.array([1.0, 1.5]), np.array([1.0, 2.0]), np.ones(2))
        problem = hg.Bilevel(
            lambda p, lam, b: 0.5 * backend.xp.sum(h * p * p) - lam * backend.xp.sum(h * p),
            lambda p, lam, b: backend.xp.sum(v * p),
        )
        given = problem, one, backend.asarray(1.0), None, None, hg.Implicit(solver)
        limit = float(hg.error_bound(*given, backend=backend))
        assert np.isfinite(limit) == known

    def test_a_matrix_that_is_not_symmetric_is_refused_by_who_needs_that(self, backend):
        problem = hg.FixedPoint(lambda p, h, b: 0.5 * p * h, lambda p, h, b: backend.xp.sum(p))
        at = arrays(backend, np.zeros(2), np.ones(2))
        with pytest.raises(ArgumentError, match="symmetric"):
            hg.error_bound(problem, *at, None, None, hg.Implicit(hg.CG()), backend=backend)

    def test_without_a_curvature_nothing_is_claimed(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        given = told.problem(backend), theta, lam, *told.data(backend), hg.Implicit(hg.Identity(0.1))
        assert np.isnan(float(hg.error_bound(*given, backend=backend)))

    def test_it_is_of_the_loss_itself(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        gauss_newton = hg.Implicit(products=hg.GaussNewton(lambda p, h, b: p, lambda f, h, b: f @ f))
        for estimator in (gauss_newton, hg.Greedy(hg.SGD(0.1))):
            with pytest.raises(ArgumentError, match="error_bound"):
                hg.error_bound(
                    told.problem(backend), theta, lam, *told.data(backend), estimator, backend=backend
                )
