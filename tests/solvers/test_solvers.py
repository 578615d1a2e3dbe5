"""Solvers against dense NumPy, and what `Implicit` does with them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.frameworks import BACKENDS, each_backend

import hypergrad as hg
from hypergrad.errors import ArgumentError, SolveError
from hypergrad.solvers import System
from hypergrad.solvers.direct import _blocks
from hypergrad.testing.calculus import value_and_grad

ANY = [hg.GMRES(rtol=1e-8), hg.GMRES(rtol=1e-8, restart=6), hg.BiCGStab(300, rtol=1e-8), hg.Direct(rtol=1e-8)]
INDEFINITE = [hg.MINRES(rtol=1e-8), hg.GMRES(rtol=1e-8)]
DEFINITE = [
    hg.CG(rtol=1e-8),
    hg.CG(rtol=1e-8, preconditioner=hg.Nystrom(rank=3)),
    hg.CG(rtol=1e-8, preconditioner=hg.Diagonal()),
    hg.MINRES(rtol=1e-8),
    *ANY,
]


def system(kind, n=12, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = np.logspace(0, 1.5, n)
    if kind == "indefinite":
        values[::2] *= -1
    if kind == "singular":
        values[0] = 0.0
    a = rng.normal(size=(n, n)) + 5 * np.eye(n) if kind == "general" else q @ np.diag(values) @ q.T
    return a, q @ np.ones(n)


def solved(backend, solver, kind, **options):
    a, v = system(kind)
    matrix, v = backend.asarray(a), backend.asarray(v)
    return hg.solve(lambda p: matrix @ p, v, solver, symmetric=kind != "general", backend=backend, **options)


@each_backend
class TestSystems:
    @pytest.mark.parametrize(
        ("kind", "solver"),
        [("definite", s) for s in DEFINITE]
        + [("indefinite", s) for s in INDEFINITE]
        + [("general", s) for s in ANY],
        ids=str,
    )
    def test_right_to_the_tolerance(self, backend, kind, solver):
        a, v = system(kind)
        found = solved(backend, solver, kind)
        x = backend.to_numpy(found.x)
        assert np.linalg.norm(a @ x - v) <= 1e-8 * np.linalg.norm(v)
        np.testing.assert_allclose(x, np.linalg.solve(a, v), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("kind", ["definite", "general"])
    @pytest.mark.parametrize("n", [64, 65, 131])
    def test_columns_in_blocks(self, backend, n, kind):
        """A framework that maps takes them in blocks, of which the last may be longer than what is left."""
        a, v = system(kind, n)
        matrix = backend.asarray(a)
        found = hg.solve(lambda p: matrix @ p, backend.asarray(v), hg.Direct(), symmetric=kind != "general")
        np.testing.assert_allclose(backend.to_numpy(found.x), np.linalg.solve(a, v), rtol=1e-9, atol=1e-11)

    def test_an_approximation_of_full_rank_is_the_matrix(self, backend):
        a, v = system("definite", 20)
        matrix = backend.asarray(a)
        found = hg.solve(lambda p: matrix @ p, backend.asarray(v), hg.Nystrom(20, damping=1e-12))
        np.testing.assert_allclose(backend.to_numpy(found.x), np.linalg.solve(a, v), rtol=1e-7)

    @pytest.mark.parametrize("solver", [hg.CG(), hg.MINRES(), hg.GMRES(), hg.Direct()], ids=str)
    def test_a_singular_system_is_called_so(self, backend, solver):
        with pytest.raises(SolveError) as error:
            solved(backend, solver, "singular")
        assert error.value.reason == "singular"

    @pytest.mark.parametrize("solver", [hg.CG(), hg.Direct(), hg.Nystrom(rank=12, rtol=1e-3)], ids=str)
    def test_negative_curvature_is_never_success(self, backend, solver):
        with pytest.raises(SolveError) as error:
            solved(backend, solver, "indefinite")
        assert error.value.reason == "negative_curvature"

    @pytest.mark.parametrize("solver", [hg.CG(), hg.MINRES(), hg.Nystrom(), hg.Diagonal()], ids=str)
    def test_symmetry_is_asked_for(self, backend, solver):
        with pytest.raises(ArgumentError, match=r"hg\.GMRES"):
            solved(backend, solver, "general")

    def test_too_few_steps_say_the_true_residual(self, backend):
        with pytest.raises(SolveError) as error:
            solved(backend, hg.GMRES(max_steps=3), "general")
        assert error.value.reason == "max_steps"
        assert error.value.residual > 1e-6

    def test_a_warm_start_needs_no_step(self, backend):
        x = solved(backend, hg.CG(rtol=1e-8), "definite").x
        assert int(solved(backend, hg.CG(rtol=1e-6), "definite", start=x).iterations) == 0

    def test_a_solver_of_another_library(self, backend):
        def dense(matvec, v):
            return np.linalg.solve(np.stack([matvec(e) for e in np.eye(v.size)], 1), v)

        found = solved(backend, hg.External(dense, rtol=1e-8, on_host=True), "general")
        np.testing.assert_allclose(backend.to_numpy(found.x), np.linalg.solve(*system("general")), rtol=1e-8)

    def test_one_of_scipy(self, backend):
        linalg = pytest.importorskip("scipy.sparse.linalg")

        def cg(matvec, v):
            operator = linalg.LinearOperator((v.size, v.size), matvec, dtype=v.dtype)
            return linalg.cg(operator, v, rtol=1e-10)[0]

        found = solved(backend, hg.External(cg, rtol=1e-8, on_host=True), "definite")
        np.testing.assert_allclose(backend.to_numpy(found.x), np.linalg.solve(*system("definite")), rtol=1e-6)
        # It reports success on a singular system, where no x is right.
        with pytest.raises(SolveError):
            solved(backend, hg.External(cg, rtol=1e-8, on_host=True), "singular")


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 129, 1000])
def test_a_block_of_a_program_has_64_columns_at_most(n):
    width, offsets = _blocks(SimpleNamespace(compiles=True, stack=np.array), n)
    assert width <= 64 and offsets.tolist() == list(range(width))
    assert -(-n // width) == -(-n // 64)


class OnScalars:
    """A backend none of whose scalars can be read."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def number(self, scalar):
        return None


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "jax"])
class TestNumbers:
    @pytest.mark.parametrize(
        "solver", [hg.CG(6), hg.MINRES(6), hg.BiCGStab(6), hg.Neumann(6), hg.Neumann(6, 0.01, 1e-4)], ids=str
    )
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("kind", ["definite", "indefinite", "singular"])
    def test_a_solve_on_numbers_is_one_on_scalars(self, name, solver, dtype, kind):
        backend = BACKENDS[name]
        a, v = (backend.asarray(part.astype(dtype)) for part in system(kind))
        systems = (
            System(backend, lambda p: a @ p, v),
            System(OnScalars(backend), lambda p: a @ p, v),
        )
        one, other = (solver.solve(s) for s in systems)
        assert (int(one.iterations), int(one.failure)) == (int(other.iterations), int(other.failure))
        tolerance = 1e4 * float(np.finfo(dtype).eps)
        for field in ("x", "curvature", "smallest"):
            found, expected = getattr(one, field), getattr(other, field)
            assert backend.owns(found) and backend.describe(found).dtype == dtype
            found, expected = backend.to_numpy(found), backend.to_numpy(expected)
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize(
        "solver", [hg.CG(), hg.MINRES(), hg.BiCGStab(), hg.Neumann(400, rtol=1e-4)], ids=str
    )
    def test_a_derivative_goes_through_the_steps(self, name, solver):
        backend, (a, v) = BACKENDS[name], system("definite")
        b, u = np.diag(np.linspace(0, 1, len(v))), np.linspace(1, 2, len(v))
        matrix, slope, right, weight = (backend.asarray(part) for part in (a, b, v, u))

        def along(s):
            found = hg.solve(lambda p: (matrix + s * slope) @ p, right, solver, backend=backend)
            return backend.inner(weight, found.x)

        _, found = value_and_grad(backend, along, backend.asarray(np.array(0.5)))
        x, w = (np.linalg.solve(a + 0.5 * b, part) for part in (v, u))
        np.testing.assert_allclose(backend.to_numpy(found), -w @ b @ x, rtol=1e-3)


@pytest.mark.skipif("jax" not in BACKENDS, reason="JAX is not installed")
def test_one_of_jax_within_a_program():
    import jax

    problem, theta, lam, train, val, exact = ridge(BACKENDS["jax"])
    cg = hg.External(lambda matvec, v: jax.scipy.sparse.linalg.cg(matvec, v, tol=1e-10)[0], rtol=1e-8)
    program = jax.jit(lambda lam: hg.hypergradient(problem, theta, lam, train, val, hg.Implicit(cg)))
    np.testing.assert_allclose(program(lam), exact, rtol=1e-6)


def ridge(backend):
    """Least squares with a penalty for each feature; its optimum, and dC2/dλ in closed form."""
    rng = np.random.default_rng(3)
    x, y, xv, yv = rng.normal(size=(9, 4)), rng.normal(size=9), rng.normal(size=(6, 4)), rng.normal(size=6)
    lam = np.array([0.5, 1.0, 2.0, 0.7])
    hessian = x.T @ x + np.diag(lam)
    theta = np.linalg.solve(hessian, x.T @ y)
    exact = -theta * np.linalg.solve(hessian, xv.T @ (xv @ theta - yv))

    def model(p, h, b):
        return b[0] @ p

    def fit(f, b):
        return 0.5 * backend.xp.sum((f - b[1]) ** 2)

    def inner(p, h, b):
        return fit(model(p, h, b), b) + 0.5 * backend.xp.sum(h * p * p)

    problem = hg.Bilevel(inner, lambda p, h, b: fit(model(p, h, b), b))
    made = [backend.asarray(z) for z in (theta, lam, x, y, xv, yv)]
    return problem, made[0], made[1], tuple(made[2:4]), tuple(made[4:]), exact


@each_backend
class TestImplicit:
    @pytest.mark.parametrize("solver", DEFINITE, ids=str)
    def test_a_penalty_for_each_feature(self, backend, solver):
        problem, theta, lam, train, val, exact = ridge(backend)
        found = hg.hypergradient(problem, theta, lam, train, val, hg.Implicit(solver), backend=backend)
        np.testing.assert_allclose(backend.to_numpy(found), exact, rtol=1e-6)

    def test_gauss_newton_is_the_hessian_of_least_squares(self, backend):
        problem, theta, lam, train, val, exact = ridge(backend)
        curvature = hg.GaussNewton(
            lambda p, h, b: (b[0] @ p, p),
            lambda f, h, b: 0.5 * backend.xp.sum((f[0] - b[1]) ** 2) + 0.5 * backend.xp.sum(h * f[1] * f[1]),
        )
        estimator = hg.Implicit(hg.CG(rtol=1e-10), products=curvature)
        found = hg.hypergradient(problem, theta, lam, train, val, estimator, backend=backend)
        np.testing.assert_allclose(backend.to_numpy(found), exact, rtol=1e-8)

    def test_a_warm_start_goes_on_and_leaves_the_first_state(self, backend):
        problem, theta, lam, train, val, exact = ridge(backend)
        estimator = hg.Implicit(hg.Warm(hg.CG(rtol=1e-8)))
        state = estimator.init(problem, theta, lam, backend=backend)
        first = estimator.estimate(problem, state, lam, train, val, backend=backend)
        second = estimator.estimate(problem, first.state, lam, train, val, backend=backend)
        again = estimator.estimate(problem, state, lam, train, val, backend=backend)
        assert int(second.report.solve.iterations) == 0 < int(first.report.solve.iterations)
        assert int(again.report.solve.iterations) == int(first.report.solve.iterations)
        np.testing.assert_allclose(backend.to_numpy(second.hypergradient), exact, rtol=1e-6)

    @pytest.mark.parametrize(
        "solver", [hg.CG(), hg.Warm(hg.CG()), hg.Warm(hg.Damped(hg.CG(), 0.1)), hg.Amortised(0.05)], ids=str
    )
    def test_an_estimate_leaves_the_structure_of_its_memory(self, backend, solver):
        """So that a state can be carried through a loop that is compiled."""
        problem, theta, lam, train, val, _ = ridge(backend)
        estimator = hg.Implicit(solver)
        state = estimator.init(problem, theta, lam, backend=backend)
        after = estimator.estimate(problem, state, lam, train, val, backend=backend).state
        found = [backend.paths(at.memory, "memory") for at in (state, after)]
        assert found[0] == found[1] and bool(found[0]) == (solver != hg.CG())

    def test_one_step_with_each_estimate_comes_to_the_solution(self, backend):
        problem, theta, lam, train, val, exact = ridge(backend)
        estimator = hg.Implicit(hg.Amortised(0.05))
        state = estimator.init(problem, theta, lam, backend=backend)
        for _ in range(200):
            out = estimator.estimate(problem, state, lam, train, val, backend=backend)
            state = out.state
        assert int(out.report.products) == 1
        np.testing.assert_allclose(backend.to_numpy(out.hypergradient), exact, rtol=1e-4)

    @pytest.mark.parametrize("solver", [hg.GMRES(rtol=1e-10), hg.Direct(rtol=1e-8)], ids=str)
    def test_the_lasso_responds_on_its_support(self, backend, solver):
        rng = np.random.default_rng(5)
        x, xv = rng.normal(size=(20, 6)), rng.normal(size=(12, 6))
        truth = np.array([2.0, -1.5, 0, 0, 1.0, 0])
        y, yv, l1, eta = x @ truth, xv @ truth + 0.1, 3.0, 0.01

        def optimum(l1):
            p = np.zeros(6)
            for _ in range(20_000):
                p = p - eta * x.T @ (x @ p - y)
                p = np.sign(p) * np.maximum(abs(p) - eta * l1, 0)
            return p

        def cost(l1):
            return 0.5 * np.sum((xv @ optimum(l1) - yv) ** 2)

        def fit(p, h, b):
            return 0.5 * backend.xp.sum((b[0] @ p - b[1]) ** 2)

        rule = hg.Proximal(hg.SGD(eta), lambda p, h: hg.soft_threshold(p, eta * h["l1"]))
        theta = optimum(l1)
        assert 0 < np.sum(theta == 0) < 6
        found = hg.hypergradient(
            hg.FixedPoint.of_update(hg.Bilevel(fit, fit), rule),
            backend.asarray(theta),
            {"l1": backend.asarray(l1)},
            tuple(map(backend.asarray, (x, y))),
            tuple(map(backend.asarray, (xv, yv))),
            hg.Implicit(solver),
            backend=backend,
        )
        difference = (cost(l1 + 1e-4) - cost(l1 - 1e-4)) / 2e-4
        np.testing.assert_allclose(backend.to_numpy(found["l1"]), difference, rtol=1e-6)

    def test_a_rule_with_a_state_is_refused(self, backend):
        problem, theta, lam, train, val, _ = ridge(backend)
        problem = hg.FixedPoint.of_update(problem, hg.SGD(0.01, momentum=0.9))
        with pytest.raises(ArgumentError, match="momentum"):
            hg.hypergradient(problem, theta, lam, train, val, hg.Implicit(hg.GMRES()), backend=backend)
