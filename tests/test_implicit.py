"""What `Implicit` does beyond one solve at an optimum: other conditions, other matrices, its own error."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from frameworks import BACKENDS, COMPILED, NUMPY, affordable, program

import hypergrad as hg
from hypergrad.errors import ArgumentError, SolveError, UnsupportedOpError

each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def arrays(backend, *values):
    return tuple(backend.asarray(np.asarray(value)) for value in values)


def numbers(backend, tree):
    return backend.to_numpy(backend.ravel(tree)[0])


def central(f, x, h=1e-5):
    """Central differences of a function of a vector."""
    return np.array([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(len(x))])


class Logistic:
    """Logistic regression with a penalty for each feature, in NumPy: optimum, derivatives, hypergradient."""

    def __init__(self, n=6, count=30, seed=0):
        rng = np.random.default_rng(seed)
        self.x, self.xv = rng.normal(size=(count, n)), rng.normal(size=(count, n))
        truth = rng.normal(size=n)
        self.y, self.yv = (np.sign(x @ truth + rng.normal(size=count)) for x in (self.x, self.xv))
        self.lam = np.exp(rng.normal(size=n) - 1)

    def slope(self, theta, lam):
        s = 1 / (1 + np.exp(self.y * (self.x @ theta)))
        return -self.x.T @ (self.y * s) + lam * theta

    def hessian(self, theta, lam):
        s = 1 / (1 + np.exp(self.y * (self.x @ theta)))
        return self.x.T @ ((s * (1 - s))[:, None] * self.x) + np.diag(lam)

    def optimum(self, lam):
        theta = np.zeros(len(lam))
        for _ in range(50):
            theta = theta - np.linalg.solve(self.hessian(theta, lam), self.slope(theta, lam))
        return theta

    def outer(self, theta):
        return np.sum(np.log1p(np.exp(-self.yv * (self.xv @ theta))))

    def outer_slope(self, theta):
        return -self.xv.T @ (self.yv / (1 + np.exp(self.yv * (self.xv @ theta))))

    def hypergradient(self, theta, lam):
        return -theta * np.linalg.solve(self.hessian(theta, lam), self.outer_slope(theta))

    def problem(self, backend):
        xp = backend.xp

        def outer(p, h, b):
            return xp.sum(xp.log1p(xp.exp(-b[1] * (b[0] @ p))))

        return hg.Bilevel(lambda p, h, b: outer(p, h, b) + 0.5 * xp.sum(h * p * p), outer)

    def data(self, backend):
        return arrays(backend, self.x, self.y), arrays(backend, self.xv, self.yv)


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


def equilibrium(backend, n=5, seed=0):
    """θ = tanh(W θ + s u), an equilibrium layer with a W that is not symmetric; its fixed point, and F(λ)."""
    rng = np.random.default_rng(seed)
    w, u, y = 0.3 * rng.normal(size=(n, n)), rng.normal(size=n), rng.normal(size=n)
    lam = np.concatenate([w.ravel(), [0.7]])

    def split(lam):
        return lam[: n * n].reshape(n, n), lam[n * n]

    def settle(lam):
        w, s = split(lam)
        theta = np.zeros(n)
        for _ in range(200):
            theta = np.tanh(w @ theta + s * u)
        return theta

    def cost(lam):
        return 0.5 * np.sum((settle(lam) - y) ** 2)

    problem = hg.FixedPoint(
        lambda p, h, b: backend.xp.tanh(h["w"] @ p + h["s"] * b),
        lambda p, h, b: 0.5 * backend.xp.sum((p - b) ** 2),
    )
    hparams = {"s": backend.asarray(lam[-1]), "w": backend.asarray(w)}
    exact = central(cost, lam)
    # Trees come sorted by key: s first.
    return problem, settle(lam), hparams, backend.asarray(u), backend.asarray(y), np.roll(exact, 1)


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

    @pytest.mark.parametrize("option", [{"mixed": hg.FiniteDifference()}, {"update": hg.SGD(0.1)}], ids=str)
    def test_what_needs_a_loss_is_refused(self, backend, option):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        with pytest.raises(ArgumentError, match="FixedPoint"):
            hg.hypergradient(
                problem, backend.asarray(theta), lam, u, y, hg.Implicit(hg.GMRES(), **option), backend=backend
            )

    def test_a_map_into_another_space_is_refused(self, backend):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        wrong = hg.FixedPoint(lambda p, h, b: p[:2], problem.outer)
        with pytest.raises(ArgumentError, match="shape"):
            hg.hypergradient(
                wrong, backend.asarray(theta), lam, u, y, hg.Implicit(hg.GMRES()), backend=backend
            )


def by_hand(backend=NUMPY, **wrong):
    """The derivatives of logistic regression with a penalty for each feature, as a user would write them."""
    xp = backend.xp

    def wrongness(b, p):
        return 1 / (1 + xp.exp(b[1] * (b[0] @ p)))

    def hessian_product(p, h, b, q):
        s = wrongness(b, p)
        return b[0].T @ (s * (1 - s) * (b[0] @ q)) + h * q

    given = {
        "outer_grads": lambda p, h, b: (-b[0].T @ (b[1] * wrongness(b, p)), None),
        "hessian_product": hessian_product,
        "mixed_product": lambda p, h, b, q: p * q,
        "inner_grad": lambda p, h, b: -b[0].T @ (b[1] * wrongness(b, p)) + h * p,
        "outer": lambda p, h, b: xp.sum(xp.log1p(xp.exp(-b[1] * (b[0] @ p)))),
    }
    return hg.Derivatives(**(given | wrong))


@each_backend
class TestDerivatives:
    @pytest.mark.parametrize(
        "estimator",
        [
            hg.Implicit(hg.CG(rtol=1e-12), tolerance=1e9),
            hg.Implicit(hg.Direct(), tolerance=1e9),
            hg.Greedy(hg.SGD(0.01)),
            hg.Greedy(hg.Adam(0.01)),
            hg.Greedy(hg.SGD(0.01, momentum=0.9), response="gradient", lookahead=False),
        ],
        ids=str,
    )
    def test_by_hand_as_by_machine(self, backend, estimator):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam) + 0.1, told.lam)
        results = []
        for problem in (told.problem(backend), by_hand(backend)):
            state = estimator.init(problem, theta, lam, backend=backend)
            results.append(estimator.estimate(problem, state, lam, *told.data(backend), backend=backend))
        made, given = (numbers(backend, out.hypergradient) for out in results)
        np.testing.assert_allclose(given, made, rtol=1e-9, atol=1e-12)
        trained = [numbers(backend, out.state.params) for out in results]
        np.testing.assert_allclose(*trained, rtol=1e-9, atol=1e-12)

    def test_three_functions_are_enough_for_implicit(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        problem = by_hand(backend, inner_grad=None, outer=None)
        estimator = hg.Implicit(hg.CG(rtol=1e-12))
        state = estimator.init(problem, theta, lam, backend=backend)
        out = estimator.estimate(problem, state, lam, *told.data(backend), backend=backend)
        exact = told.hypergradient(told.optimum(told.lam), told.lam)
        np.testing.assert_allclose(numbers(backend, out.hypergradient), exact, rtol=1e-9)
        assert np.isnan(float(out.report.inner_gradient_norm))
        for option in ({"strict": True}, {"bound": True}):
            with pytest.raises(ArgumentError, match="inner_grad"):
                hg.hypergradient(
                    problem, theta, lam, *told.data(backend), hg.Implicit(**option), backend=backend
                )

    def test_online_nobody_expects_an_optimum(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam) + 1.0, told.lam)
        given = told.problem(backend), theta, lam, *told.data(backend)
        hg.hypergradient(*given, hg.Implicit(tolerance=None), backend=backend)  # warnings are errors here
        with pytest.raises(ArgumentError, match="strict"):
            hg.Implicit(tolerance=None, strict=True)

    def test_training_without_a_gradient_is_refused(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        with pytest.raises(ArgumentError, match="inner_grad"):
            hg.hypergradient(
                by_hand(backend, inner_grad=None), theta, lam, *told.data(backend),
                hg.Greedy(hg.SGD(0.1)), backend=backend,
            )  # fmt: skip

    def test_an_unroll_is_refused(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.lam, told.lam)
        for estimator in (hg.Unrolled(hg.SGD(0.1), steps=2), hg.Forward(hg.SGD(0.1), steps=2)):
            with pytest.raises(ArgumentError, match="Implicit or Greedy"):
                hg.hypergradient(
                    by_hand(backend), theta, lam, *told.data(backend), estimator, backend=backend
                )

    def test_a_wrong_shape_is_named(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        problem = by_hand(backend, mixed_product=lambda p, h, b, q: q[:2])
        with pytest.raises(ArgumentError, match="mixed_product"):
            hg.hypergradient(problem, theta, lam, *told.data(backend), hg.Implicit(), backend=backend)

    def test_a_check_of_right_derivatives(self, backend):
        told = Logistic()
        check = hg.check_derivatives(
            by_hand(backend), *arrays(backend, told.lam, told.lam), *told.data(backend),
            directions=2, backend=backend,
        )  # fmt: skip
        assert max(check.outer_grads, check.hessian_product, check.mixed_product) <= 1e-7
        assert check.symmetry <= 1e-12
        assert check.inner_grad is None

    @pytest.mark.parametrize("name", ["outer_grads", "hessian_product", "mixed_product"])
    def test_a_check_finds_the_wrong_one(self, backend, name):
        told = Logistic()
        right = by_hand(backend)
        f = getattr(right, name)

        def off(*args):
            return (1.01 * f(*args)[0], None) if name == "outer_grads" else 1.01 * f(*args)

        check = hg.check_derivatives(
            by_hand(backend, **{name: off}), *arrays(backend, told.lam, told.lam),
            *told.data(backend), directions=1, backend=backend,
        )  # fmt: skip
        for field in ("outer_grads", "hessian_product", "mixed_product"):
            assert (getattr(check, field) > 5e-3) == (field == name)
        assert f"{getattr(check, name):.1e}" in str(check)


class TestSparse:
    def test_a_tuner_over_scipy(self):
        """Sparse logistic regression, which no framework differentiates, tuned online by implicit steps."""
        sparse = pytest.importorskip("scipy.sparse")
        told = Logistic(n=12, count=60)
        x, xv = (sparse.csr_matrix(a * (abs(a) > 0.5)) for a in (told.x, told.xv))
        told.x, told.xv = x.toarray(), xv.toarray()

        def weights(x, y, p):
            return 1 / (1 + np.exp(y * (x @ p)))

        problem = hg.Derivatives(
            lambda p, h, b: (-(b[0].T @ (b[1] * weights(*b, p))), None),
            lambda p, h, b, q: b[0].T @ (weights(*b, p) * (1 - weights(*b, p)) * (b[0] @ q)) + np.exp(h) * q,
            lambda p, h, b, q: np.exp(h) * p * q,
            inner_grad=lambda p, h, b: -(b[0].T @ (b[1] * weights(*b, p))) + np.exp(h) * p,
            outer=lambda p, h, b: np.sum(np.log1p(np.exp(-b[1] * (b[0] @ p)))),
        )
        log_l2 = np.full(12, -4.0)
        theta = told.optimum(np.exp(log_l2))
        found = hg.hypergradient(
            problem, theta, log_l2, (x, told.y), (xv, told.yv), hg.Implicit(hg.CG(rtol=1e-10))
        )
        differences = central(lambda h: told.outer(told.optimum(np.exp(h))), log_l2)
        np.testing.assert_allclose(found, differences, rtol=1e-5, atol=1e-8)

        tuner = hg.Tuner(
            problem, hg.Implicit(hg.CG(), warm_start=True, tolerance=1e9), update=hg.SGD(0.02),
            hyper_update=hg.Adam(0.1), every=5,
        )  # fmt: skip
        run = tuner.run(theta, log_l2, (x, told.y), (xv, told.yv), steps=300)
        assert told.outer(told.optimum(np.exp(run.hparams))) < told.outer(theta)


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
        estimator = hg.Implicit(hg.CG(rtol=1e-10), hg.LevenbergMarquardt(initial=0.03, factor=10.0))
        theta, lam, h_, v_ = arrays(backend, theta, lam, h, v)
        state = estimator.init(problem, theta, lam, backend=backend)

        def run(state):
            return estimator.estimate(problem, state, lam, h_, v_, backend=backend)

        run = program(backend, run) if compiled else run
        out = run(state)
        used = 3.0  # 0.03 and 0.3 leave a negative eigenvalue
        assert float(out.report.damping) == pytest.approx(used)
        assert float(out.state.memory.damping) == pytest.approx(used / 10)
        exact = np.linalg.solve(h + used * np.eye(3), v)
        np.testing.assert_allclose(numbers(backend, out.hypergradient), exact, rtol=1e-8)
        # The next estimate begins at 0.3, fails once, and comes to the same.
        again = run(out.state)
        assert float(again.report.damping) == pytest.approx(used)
        assert int(again.report.products) < int(out.report.products)

    def test_a_last_attempt_that_fails_is_a_failure(self, backend):
        problem, h, v, lam, theta = saddle(backend)
        estimator = hg.Implicit(hg.CG(), hg.LevenbergMarquardt(initial=1e-3, attempts=2))
        with pytest.raises(SolveError) as error:
            hg.hypergradient(
                problem, *arrays(backend, theta, lam), *arrays(backend, h, v), estimator, backend=backend
            )
        assert error.value.reason == "negative_curvature"

    def test_a_definite_system_costs_little_damping(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        estimator = hg.Implicit(hg.CG(rtol=1e-10), hg.LevenbergMarquardt(initial=1e-6))
        state = estimator.init(told.problem(backend), theta, lam, backend=backend)
        for _ in range(3):
            out = estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)
            state = out.state
        assert float(out.report.damping) == pytest.approx(1e-8)


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
        estimator = hg.Implicit(hg.Neumann(terms, eta), fresh=True, tolerance=1e9)
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
            estimator = hg.Implicit(hg.Neumann(4, 0.02), fresh=True, tolerance=None)
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
                hg.Implicit(hg.Neumann(4, 0.02), fresh=True, curvature=c, tolerance=None), backend=backend,
            )
            for c in (None, curvature)
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
            hg.Implicit(hg.Neumann(3, 0.01), fresh=True, tolerance=None),
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
        estimator = hg.Implicit(hg.Amortised(0.02), tolerance=1e9)
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

    @pytest.mark.parametrize(
        "solver", [hg.CG(), hg.Neumann(rtol=1e-3), hg.GMRES(), hg.Amortised(0.1)], ids=str
    )
    def test_a_promise_is_refused(self, backend, solver):
        with pytest.raises(ArgumentError, match="fresh"):
            hg.Implicit(solver, fresh=True)


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
            estimator = hg.Implicit(solver, accuracy=tolerance)
            state = estimator.init(problem, theta, lam, backend=backend)
            out = estimator.estimate(problem, state, lam, train, val, backend=backend)
            error = np.linalg.norm(numbers(backend, out.hypergradient) - exact) / np.linalg.norm(exact)
            assert error <= tolerance
            assert float(out.report.error) <= tolerance

    def test_it_costs_less_than_a_residual_to_be_safe(self, backend):
        problem, (theta, lam), train, val, _ = ill_conditioned(backend, 1e3)
        spent = []
        for estimator in (hg.Implicit(hg.CG(1000), accuracy=1e-2), hg.Implicit(hg.CG(1000, rtol=1e-8))):
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
            problem, ones, backend.asarray(0.0), None, None, hg.Implicit(accuracy=1e-2), backend=backend
        )
        np.testing.assert_allclose(numbers(backend, found), -49.0, rtol=1e-2)

    def test_single_precision_goes_as_far_as_it_can(self, backend):
        problem, (theta, lam), train, val, exact = ill_conditioned(backend, 1e4, n=60)
        narrow = backend.map(lambda x: backend.cast(x, "float32"), (theta, lam, train, val))
        estimator = hg.Implicit(hg.CG(2000), accuracy=1e-4, tolerance=None)
        found = hg.hypergradient(problem, *narrow, estimator, backend=backend)
        error = np.linalg.norm(numbers(backend, found) - exact) / np.linalg.norm(exact)
        assert error <= 1e-2  # κ ε is 1e-3 here, whatever is asked for

    def test_too_few_steps_are_a_failure(self, backend):
        problem, (theta, lam), train, val, _ = ill_conditioned(backend, 1e3)
        with pytest.raises(SolveError) as error:
            hg.hypergradient(
                problem, theta, lam, train, val, hg.Implicit(hg.CG(2), accuracy=1e-6), backend=backend
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
            estimator = hg.Implicit(hg.CG(rtol=rtol), bound=True, tolerance=1e9)
            state = estimator.init(told.problem(backend), *arrays(backend, theta, told.lam), backend=backend)
            out = estimator.estimate(
                told.problem(backend), state, backend.asarray(told.lam), *told.data(backend), backend=backend
            )
            exact = told.hypergradient(best, told.lam)
            error = np.linalg.norm(numbers(backend, out.hypergradient) - exact)
            limit = float(out.report.error_bound)
            assert error <= limit + 1e-12
            lowest = np.linalg.eigvalsh(told.hessian(theta, told.lam))[0]
            assert lowest * (1 - 1e-6) <= float(out.report.smallest_curvature)
            # It is no better than its constants: the condition number of H, and of ∂_λ G.
            assert limit <= 1e-6 + 300 * (away + rtol)

    @pytest.mark.parametrize("options", [{"damping": 0.1}, {"damping": 1.0}, {"warm_start": True}], ids=str)
    def test_it_is_above_the_error_of_a_damped_solve_or_says_nothing(self, backend, options):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        estimator = hg.Implicit(hg.CG(rtol=1e-8), bound=True, **options)
        state = estimator.init(told.problem(backend), theta, lam, backend=backend)
        for _ in range(2):
            out = estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)
            state = out.state
            exact = told.hypergradient(told.optimum(told.lam), told.lam)
            error = np.linalg.norm(numbers(backend, out.hypergradient) - exact)
            assert not float(out.report.error_bound) < error

    def test_without_a_curvature_nothing_is_claimed(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        estimator = hg.Implicit(hg.Identity(0.1), bound=True)
        state = estimator.init(told.problem(backend), theta, lam, backend=backend)
        out = estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)
        assert np.isnan(float(out.report.error_bound))


def levels(n=3, seed=0):
    """Data of three levels: two of least squares, and a target for the parameters."""
    rng = np.random.default_rng(seed)
    a, c, y = rng.normal(size=(6, n)), rng.normal(size=(5, n)), rng.normal(size=6)
    z, target = rng.normal(size=5), rng.normal(size=n)
    return a, y, c, z, target


@each_backend
class TestHigherOrder:
    def test_three_levels_against_differences_of_solving_them(self, backend):
        xp = backend.xp
        a, y, c, z, target = levels()

        def c1(p, h, b):
            lam, _ = h
            return 0.5 * xp.sum((b[0] @ p - b[1]) ** 2) + 0.5 * xp.sum(xp.exp(lam) * p * p)

        def c2(p, h, b):
            lam, mu = h
            return 0.5 * xp.sum((b[0] @ p - b[1]) ** 2) + 0.5 * xp.sum(xp.exp(mu) * (lam - 0.5) ** 2)

        def c3(level, mu, b):
            return 0.5 * xp.sum((level.params - b) ** 2) + 0.1 * xp.sum(level.hparams**2 * xp.exp(-mu))

        lower = hg.Bilevel(c1, c2)
        upper = hg.Bilevel(lower, c3)

        def theta_of(lam):
            h = a.T @ a + np.diag(np.exp(lam))
            return np.linalg.solve(h, a.T @ y), h

        def slope(lam, mu):
            theta, h = theta_of(lam)
            x = np.linalg.solve(h, c.T @ (c @ theta - z))
            return np.exp(mu) * (lam - 0.5) - np.exp(lam) * theta * x

        def lam_of(mu):
            lam = np.full(3, 0.5)
            for _ in range(100):
                jacobian = np.stack([
                    (slope(lam + 1e-6 * e, mu) - slope(lam - 1e-6 * e, mu)) / 2e-6 for e in np.eye(3)
                ], 1)  # fmt: skip
                step = np.linalg.solve(jacobian, slope(lam, mu))
                lam = lam - step
                if np.linalg.norm(step) < 1e-13:
                    break
            return lam

        def cost(mu):
            lam = lam_of(mu)
            theta, _ = theta_of(lam)
            return 0.5 * np.sum((theta - target) ** 2) + 0.1 * np.sum(lam**2 * np.exp(-mu))

        mu = np.array([0.5, 1.0, 0.8])
        lam = lam_of(mu)
        theta, lam_, mu_ = arrays(backend, theta_of(lam)[0], lam, mu)
        train, val, third = arrays(backend, a, y), arrays(backend, c, z), backend.asarray(target)
        x = hg.adjoint(lower, theta, (lam_, mu_), train, val, hg.Direct(), backend=backend)
        level = hg.Level(theta, lam_, x)
        exact = central(cost, mu, 1e-4)
        for solver in (hg.MINRES(200, rtol=1e-9), hg.Direct(), hg.GMRES(200, rtol=1e-9)):
            found = hg.hypergradient(
                upper, level, mu_, (train, val), third, hg.Implicit(solver), backend=backend
            )
            np.testing.assert_allclose(numbers(backend, found), exact, rtol=1e-5)

    def test_what_is_no_level_is_refused(self, backend):
        lower = hg.Bilevel(lambda p, h, b: backend.xp.sum(p * p), lambda p, h, b: backend.xp.sum(p))
        upper = hg.Bilevel(lower, lambda p, h, b: backend.xp.sum(p))
        theta = backend.asarray(np.ones(2))
        with pytest.raises(ArgumentError, match="Level"):
            estimator = hg.Implicit(hg.MINRES())
            hg.hypergradient(upper, theta, theta, (None, None), None, estimator, backend=backend)

    @pytest.mark.parametrize(
        "solver", [hg.CG(rtol=1e-12), hg.MINRES(rtol=1e-12), hg.Direct(), hg.GMRES(rtol=1e-12)], ids=str
    )
    def test_an_estimate_has_a_derivative(self, backend, solver):
        told = Logistic()
        theta, lam = told.optimum(told.lam), told.lam
        w = np.random.default_rng(9).normal(size=lam.size)
        train, val = told.data(backend)
        estimator = hg.Implicit(solver, tolerance=1e9)
        w_ = backend.asarray(w)

        def along(p, h):
            g = hg.hypergradient(told.problem(backend), p, h, train, val, estimator, backend=backend)
            return backend.xp.sum(w_ * g)

        _, pullback = backend.vjp(along, *arrays(backend, theta, lam))
        by_theta, by_lam = (numbers(backend, g) for g in pullback(backend.asarray(1.0)))
        differences = central(lambda h: w @ told.hypergradient(theta, h), lam)
        np.testing.assert_allclose(by_lam, differences, rtol=1e-5, atol=1e-8)
        differences = central(lambda p: w @ told.hypergradient(p, lam), theta)
        np.testing.assert_allclose(by_theta, differences, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("name", ["a", "z"])
    def test_a_leaf_that_no_hyperparameter_touches(self, backend, name):
        """A free intercept, before or after the weights in the tree."""
        told, xp = Logistic(n=3), backend.xp

        def outer(p, h, b):
            return xp.sum(xp.log1p(xp.exp(-b[1] * (b[0] @ p["w"] + p[name]))))

        problem = hg.Bilevel(
            lambda p, h, b: outer(p, h, b) + 0.5 * xp.exp(h) * xp.sum(p["w"] * p["w"]), outer
        )
        params = {name: backend.asarray(0.1), "w": backend.asarray(told.lam)}
        estimator = hg.Implicit(hg.CG(rtol=1e-12), tolerance=None)
        train, val = told.data(backend)

        def estimate(h):
            return hg.hypergradient(problem, params, h, train, val, estimator, backend=backend)

        _, pullback = backend.vjp(estimate, backend.asarray(0.3))
        (slope,) = pullback(backend.asarray(1.0))
        there, back = (float(backend.to_numpy(estimate(backend.asarray(0.3 + d)))) for d in (1e-5, -1e-5))
        np.testing.assert_allclose(float(backend.to_numpy(slope)), (there - back) / 2e-5, rtol=1e-6)

    @pytest.mark.parametrize(
        "solver",
        [hg.Identity(0.3), hg.Neumann(3, 0.05), hg.Nystrom(2, damping=0.5)],
        ids=lambda s: type(s).__name__,
    )
    def test_a_truncation_has_the_derivative_of_its_steps(self, backend, solver):
        told = Logistic(n=4)
        theta, train, val = backend.asarray(told.lam), *told.data(backend)
        estimator = hg.Implicit(solver, tolerance=None)
        w = backend.asarray(np.arange(1.0, 5.0))

        def along(h):
            g = hg.hypergradient(told.problem(backend), theta, h, train, val, estimator, backend=backend)
            return backend.inner(w, g)

        if backend.name in COMPILED and isinstance(solver, hg.Neumann):  # a while loop, which has none there
            with pytest.raises(UnsupportedOpError, match="while_loop"):
                backend.vjp(along, backend.asarray(told.lam))[1](backend.asarray(1.0))
            return
        _, pullback = backend.vjp(along, backend.asarray(told.lam))
        (slope,) = pullback(backend.asarray(1.0))
        differences = central(lambda h: float(backend.to_numpy(along(backend.asarray(h)))), told.lam)
        np.testing.assert_allclose(numbers(backend, slope), differences, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize(
        "estimator", [hg.Greedy(hg.SGD(0.1)), hg.Unrolled(hg.SGD(0.1), steps=2)], ids=str
    )
    def test_no_training_leads_to_a_level_above(self, backend, estimator):
        lower = hg.Bilevel(lambda p, h, b: backend.xp.sum(p * p), lambda p, h, b: backend.xp.sum(p))
        upper = hg.Bilevel(lower, lambda level, mu, b: backend.xp.sum(level.params))
        one = backend.asarray(np.ones(2))
        with pytest.raises(ArgumentError, match="saddle"):
            hg.hypergradient(upper, hg.Level(one, one, one), one, None, None, estimator, backend=backend)
        with pytest.raises(ArgumentError, match="saddle"):
            hg.Tuner(upper, hg.Implicit(hg.MINRES()), update=hg.SGD(0.1))

    def test_a_derivative_of_a_system_that_is_not_symmetric(self, backend):
        problem, theta, lam, u, y, _ = equilibrium(backend)
        w = np.random.default_rng(9).normal(size=26)
        w_ = backend.asarray(w)
        estimator = hg.Implicit(hg.GMRES(rtol=1e-12), tolerance=1e9)

        def along(s):
            h = {**lam, "s": s}
            g = hg.hypergradient(problem, backend.asarray(theta), h, u, y, estimator, backend=backend)
            return backend.xp.sum(w_ * backend.ravel(g)[0])

        value, pullback = backend.vjp(along, lam["s"])
        (slope,) = pullback(backend.asarray(1.0))
        h = 1e-5
        there, back = (float(backend.to_numpy(along(lam["s"] + d))) for d in (h, -h))
        np.testing.assert_allclose(float(backend.to_numpy(slope)), (there - back) / (2 * h), rtol=1e-5)

    def test_what_moves_with_each_estimate_has_none(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        estimator = hg.Implicit(hg.Amortised(0.1))

        def along(h):
            g = hg.hypergradient(
                told.problem(backend), theta, h, *told.data(backend), estimator, backend=backend
            )
            return backend.xp.sum(g)

        with pytest.raises(UnsupportedOpError):
            _, pullback = backend.vjp(along, lam)
            pullback(backend.asarray(1.0))


def test_torch_keeps_the_graph_when_asked():
    torch = pytest.importorskip("torch")
    backend = BACKENDS["torch"]
    told = Logistic()
    theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
    lam.requires_grad_()
    given = told.problem(backend), theta, lam, *told.data(backend), hg.Implicit(hg.CG(rtol=1e-12))
    assert not hg.hypergradient(*given).requires_grad
    (slope,) = torch.autograd.grad(hg.hypergradient(*given, differentiable=True).sum(), lam)
    exact = central(lambda h: told.hypergradient(told.optimum(told.lam), h).sum(), told.lam)
    np.testing.assert_allclose(slope.numpy(), exact, rtol=1e-5, atol=1e-8)


def test_a_graph_goes_with_the_estimate():
    """No cycle keeps it until the collector comes round."""
    torch = pytest.importorskip("torch")
    backend = BACKENDS["torch"]
    told = Logistic()
    given = told.problem(backend), *arrays(backend, told.optimum(told.lam), told.lam), *told.data(backend)

    def held():
        return sum(1 for x in gc.get_objects() if issubclass(type(x), torch.Tensor))

    gc.collect()
    gc.disable()
    try:
        hg.hypergradient(*given, hg.Implicit())
        before = held()
        for _ in range(5):
            hg.hypergradient(*given, hg.Implicit())
        assert held() == before
    finally:
        gc.enable()


@each_backend
def test_every_product_is_counted(backend):
    """A diagonal H whose products are told by the loss's own calls would be seen; these are known by hand."""
    told = Logistic()
    theta, lam = arrays(backend, told.optimum(told.lam), told.lam)

    def products(**options):
        estimator = hg.Implicit(hg.CG(rtol=1e-10), **options)
        state = estimator.init(told.problem(backend), theta, lam, backend=backend)
        out = estimator.estimate(told.problem(backend), state, lam, *told.data(backend), backend=backend)
        return int(out.report.products), int(out.report.gradients), int(out.report.iterations)

    cold, gradients, steps = products()
    assert (cold, gradients) == (steps + 1, 2)
    warm, _, steps = products(warm_start=True)
    assert warm == steps + 2
    assert products(bound=True)[:2] == (cold + 6, 4)
