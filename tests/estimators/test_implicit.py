"""What `Implicit` does beyond one solve at an optimum: other curvature, damping, batches and counts."""

from __future__ import annotations

import numpy as np
import pytest
from support.arrays import arrays, numbers
from support.differences import central
from support.frameworks import COMPILED, each_backend, program
from support.known import Logistic

import hypergrad as hg
from hypergrad.errors import ArgumentError, SolveError, SolveWarning


@each_backend
class TestClosedForms:
    def test_logistic_regression_against_newton(self, backend):
        told = Logistic()
        theta, lam = told.optimum(told.lam), told.lam
        found = hg.hypergradient(
            told.problem(backend), *arrays(backend, theta, lam), *told.data(backend),
            hg.Implicit(hg.CG(rtol=1e-12)), backend=backend,
        )  # fmt: skip
        np.testing.assert_allclose(numbers(backend, found), told.hypergradient(theta, lam), rtol=1e-9)
        differences = central(lambda h: told.outer(told.optimum(h)), lam)
        np.testing.assert_allclose(numbers(backend, found), differences, rtol=1e-6, atol=1e-8)

    def test_the_marginal_likelihood_of_a_gaussian_process(self, backend):
        """θ = K⁻¹y minimises ½θᵀKθ − yᵀθ, and −½yᵀθ is half of the log-likelihood's data term."""
        rng = np.random.default_rng(1)
        x = rng.uniform(-2, 2, size=12)
        y, gap = np.sin(2 * x) + 0.1 * rng.normal(size=12), (x[:, None] - x[None, :]) ** 2
        lam = np.array([0.3, -0.5, -2.0])  # log amplitude, log length, log noise

        def kernel(xp, h, gap, eye):
            return xp.exp(h[0]) * xp.exp(-0.5 * gap * xp.exp(-2 * h[1])) + xp.exp(h[2]) * eye

        def fit(p, h, b):
            gap, eye, y = b
            return 0.5 * backend.xp.sum(p * (kernel(backend.xp, h, gap, eye) @ p)) - backend.xp.sum(y * p)

        def data_term(h):
            return 0.5 * y @ np.linalg.solve(kernel(np, h, gap, np.eye(12)), y)

        # C2 is written without the factor of ½ twice over: dC2/dλ must come through the response alone.
        theta = np.linalg.solve(kernel(np, lam, gap, np.eye(12)), y)
        problem = hg.Bilevel(fit, lambda p, h, b: 0.5 * backend.xp.sum(b * p))
        found = hg.hypergradient(
            problem, *arrays(backend, theta, lam), arrays(backend, gap, np.eye(12), y),
            backend.asarray(y), hg.Implicit(hg.CG(200, rtol=1e-12)), backend=backend,
        )  # fmt: skip
        k = kernel(np, lam, gap, np.eye(12))
        parts = [k - np.exp(lam[2]) * np.eye(12), None, np.exp(lam[2]) * np.eye(12)]
        parts[1] = parts[0] * gap * np.exp(-2 * lam[1])
        exact = [-0.5 * theta @ part @ theta for part in parts]
        np.testing.assert_allclose(numbers(backend, found), exact, rtol=1e-9)
        np.testing.assert_allclose(numbers(backend, found), central(data_term, lam), rtol=1e-6)


def saddle(backend):
    """A quadratic with eigenvalues −1, 1 and 3, where a solve with a damping below 1 meets the first."""
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    h = q @ np.diag([-1.0, 1.0, 3.0]) @ q.T
    problem = hg.Bilevel(
        lambda p, lam, b: 0.5 * backend.xp.sum(p * (b @ p)) - backend.xp.sum(lam * p),
        lambda p, lam, b: backend.xp.sum(b * p),
    )
    v = np.array([1.0, -2.0, 0.5])
    lam = np.array([0.1, 0.2, 0.3])
    return problem, h, v, lam, np.linalg.solve(h, lam)


@each_backend
class TestLevenbergMarquardt:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_damping_grows_until_the_solve_succeeds_and_then_shrinks(self, backend, compiled):
        problem, h, v, lam, theta = saddle(backend)
        estimator = hg.Implicit(hg.LevenbergMarquardt(hg.CG(rtol=1e-10), initial=0.03, factor=10.0))
        theta, lam, h_, v_ = arrays(backend, theta, lam, h, v)
        state = estimator.init(problem, theta, lam, backend=backend)

        def run(state):
            return estimator.estimate(problem, state, lam, h_, v_, backend=backend)

        run = program(backend, run) if compiled else run
        out = run(state)
        used = 3.0  # 0.03 and 0.3 leave a negative eigenvalue
        assert float(out.report.solve.shift) == pytest.approx(used)
        assert float(out.state.memory.delta) == pytest.approx(used / 10)
        exact = np.linalg.solve(h + used * np.eye(3), v)
        np.testing.assert_allclose(numbers(backend, out.hypergradient), exact, rtol=1e-8)
        # The next estimate begins at 0.3, fails once, and comes to the same.
        again = run(out.state)
        assert float(again.report.solve.shift) == pytest.approx(used)
        assert int(again.report.products) < int(out.report.products)

    def test_a_last_attempt_that_fails_is_a_failure(self, backend):
        problem, h, v, lam, theta = saddle(backend)
        estimator = hg.Implicit(hg.LevenbergMarquardt(hg.CG(), initial=1e-3, attempts=2))
        with pytest.raises(SolveError) as error:
            hg.hypergradient(
                problem, *arrays(backend, theta, lam), *arrays(backend, h, v), estimator, backend=backend
            )
        assert error.value.reason == "negative_curvature"

    def test_a_definite_system_costs_little_damping(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        estimator = hg.Implicit(hg.LevenbergMarquardt(hg.CG(rtol=1e-10), initial=1e-6))
        state = estimator.init(told.problem(backend), theta, lam, backend=backend)
        for _ in range(3):
            out = estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)
            state = out.state
        assert float(out.report.solve.shift) == pytest.approx(1e-8)


@each_backend
def test_a_direct_solve_of_a_saddle_advises_what_it_has(backend):
    problem, h, v, lam, theta = saddle(backend)
    given = problem, *arrays(backend, theta, lam, h, v)
    with pytest.raises(SolveError) as error:
        hg.hypergradient(*given, hg.Implicit(hg.Direct()))
    assert "iteration" not in str(error.value) and "where Direct is exact" in str(error.value)
    with pytest.warns(SolveWarning, match="saddle"):
        found = hg.hypergradient(*given, hg.Implicit(hg.Direct(), checks=hg.Checks(unsolved="warn")))
    np.testing.assert_allclose(numbers(backend, found), np.linalg.solve(h, v), rtol=1e-10)


@each_backend
class TestFreshBatches:
    def test_each_product_takes_the_hessian_of_the_next_batch(self, backend):
        rng = np.random.default_rng(4)
        batches = [(rng.normal(size=(8, 3)), rng.normal(size=8)) for _ in range(3)]
        xv, theta, lam, eta, terms = rng.normal(size=(5, 3)), rng.normal(size=3), np.ones(3), 0.05, 5

        def fit(p, h, b):
            return 0.5 * backend.xp.sum((b[0] @ p - b[1]) ** 2)

        problem = hg.Bilevel(
            lambda p, h, b: fit(p, h, b) + 0.5 * backend.xp.sum(h * p * p),
            lambda p, h, b: 0.5 * backend.xp.sum((b @ p) ** 2),
        )
        v = xv.T @ xv @ theta
        x, term = 0 * v, v
        for k in range(terms):
            a = batches[k % 3][0]
            x, term = x + eta * term, term - eta * (a.T @ a @ term + term)
        train = [arrays(backend, *b) for b in batches]
        estimator = hg.Implicit(hg.Neumann(terms, eta, fresh=True), checks=hg.Checks(tolerance=1e9))
        found = hg.hypergradient(
            problem, *arrays(backend, theta, lam), train, backend.asarray(xv), estimator, backend=backend
        )
        np.testing.assert_allclose(numbers(backend, found), -theta * x, rtol=1e-9)

    def test_a_function_of_a_traced_step(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        (x, y), val = told.data(backend)
        scales = np.array([1.0, 0.5, 2.0, 1.5])
        held = backend.asarray(scales)

        def run(theta, lam):
            estimator = hg.Implicit(hg.Neumann(4, 0.02, fresh=True), checks=hg.Checks(away="ignore"))
            batches = lambda t: (held[t] * x, y)  # noqa: E731
            return hg.hypergradient(
                told.problem(backend), theta, lam, batches, val, estimator, backend=backend
            )

        found = program(backend, run)(theta, lam)
        v = told.outer_slope(told.optimum(told.lam))
        sum_, term = 0 * v, v
        for scale in scales:
            scaled = Logistic()
            scaled.x = scale * told.x
            h = scaled.hessian(told.optimum(told.lam), told.lam)
            sum_, term = sum_ + 0.02 * term, term - 0.02 * h @ term
        np.testing.assert_allclose(numbers(backend, found), -told.optimum(told.lam) * sum_, rtol=1e-9)

    def test_gauss_newton_products_are_fresh_too(self, backend):
        """The mean of squares is its own Gauss-Newton: both ways see the same batches."""
        rng = np.random.default_rng(8)
        train = [arrays(backend, rng.normal(size=(8, 3)), rng.normal(size=8)) for _ in range(3)]
        theta, lam, xv = arrays(backend, rng.normal(size=3), np.ones(3), rng.normal(size=(5, 3)))

        def fit(f, b):
            return 0.5 * backend.xp.sum((f - b[1]) ** 2)

        problem = hg.Bilevel(
            lambda p, h, b: fit(b[0] @ p, b) + 0.5 * backend.xp.sum(h * p * p),
            lambda p, h, b: 0.5 * backend.xp.sum((b @ p) ** 2),
        )
        curvature = hg.GaussNewton(
            lambda p, h, b: (b[0] @ p, p),
            lambda f, h, b: fit(f[0], b) + 0.5 * backend.xp.sum(h * f[1] * f[1]),
        )
        found = [
            hg.hypergradient(
                problem, theta, lam, train, xv,
                hg.Implicit(hg.Neumann(4, 0.02, fresh=True), products=p, checks=hg.Checks(away="ignore")),
                backend=backend,
            )
            for p in (hg.Exact(), curvature)
        ]  # fmt: skip
        np.testing.assert_allclose(*(numbers(backend, g) for g in found), rtol=1e-9)

    def test_a_tuner_hands_its_batches_on(self, backend):
        """The scale of each batch tells which of them a product was with."""
        seen = []
        problem = hg.Bilevel(
            lambda p, h, b: 0.5 * backend.xp.sum(b * p * p) + backend.xp.sum(h * p),
            lambda p, h, b: backend.xp.sum(p),
        )

        def batches(t):
            seen.append(t)
            return backend.asarray(np.ones(2)) * (1.0 + t)

        tuner = hg.Tuner(
            problem,
            hg.Implicit(hg.Neumann(3, 0.01, fresh=True), checks=hg.Checks(away="ignore")),
            update=hg.SGD(1e-3),
            every=2,
        )
        run = tuner.run(*arrays(backend, np.ones(2), np.zeros(2)), batches, None, steps=4)
        assert np.isfinite(run.history.outer_values[-1])
        if backend.name not in COMPILED:
            # Two steps, the estimate's own batch, three products, twice.
            assert seen == [0, 1, 2, 2, 3, 4, 2, 3, 4, 4, 5, 6]

    def test_amortised_steps_average_over_batches(self, backend):
        """Three batches in turn, one product an estimate: x settles near H⁻¹v of the mean Hessian."""
        rng = np.random.default_rng(6)
        a = [rng.normal(size=(40, 3)) / np.sqrt(40) for _ in range(3)]
        theta, lam = rng.normal(size=3), np.ones(3)
        problem = hg.Bilevel(
            lambda p, h, b: 0.5 * backend.xp.sum((b @ p) ** 2) + 0.5 * backend.xp.sum(h * p * p),
            lambda p, h, b: backend.xp.sum(b * p),
        )
        v = np.array([1.0, 2.0, -1.0])
        estimator = hg.Implicit(hg.Amortised(0.02), checks=hg.Checks(tolerance=1e9))
        theta_, lam_, v_ = arrays(backend, theta, lam, v)
        state = estimator.init(problem, theta_, lam_, backend=backend)
        train = [backend.asarray(x) for x in a]

        def step(state, batch):
            return estimator.estimate(problem, state, lam_, batch, v_, backend=backend)

        step = program(backend, step)
        for k in range(450):
            out = step(state, train[k % 3])
            state = out.state
        mean = sum(x.T @ x for x in a) / 3 + np.eye(3)
        np.testing.assert_allclose(
            numbers(backend, out.hypergradient), -theta * np.linalg.solve(mean, v), rtol=0.02
        )

    def test_a_promise_is_refused(self, backend):
        with pytest.raises(ArgumentError, match="fresh"):
            hg.Neumann(rtol=1e-3, fresh=True)
        for wrap in (lambda s: hg.UntilAccurate(s, 1e-2), hg.LevenbergMarquardt):
            with pytest.raises(ArgumentError, match="fresh=True"):
                wrap(hg.Neumann(fresh=True))

    def test_a_matrix_alone_has_no_other_batches(self, backend):
        with pytest.raises(ArgumentError, match="batches"):
            hg.solve(lambda p: p, backend.asarray(np.ones(3)), hg.Neumann(fresh=True), backend=backend)


@each_backend
def test_every_product_is_counted(backend):
    """A diagonal H whose products are told by the loss's own calls would be seen; these are known by hand."""
    told = Logistic()
    theta, lam = arrays(backend, told.optimum(told.lam), told.lam)

    def products(solver):
        estimator = hg.Implicit(solver)
        state = estimator.init(told.problem(backend), theta, lam, backend=backend)
        out = estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)
        return int(out.report.products), int(out.report.gradients), int(out.report.solve.iterations)

    cold, gradients, steps = products(hg.CG(rtol=1e-10))
    assert (cold, gradients) == (steps + 1, 2)
    warm, _, steps = products(hg.Warm(hg.CG(rtol=1e-10)))
    assert warm == steps + 2
