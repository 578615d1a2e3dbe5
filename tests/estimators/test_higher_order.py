"""Levels above levels, and derivatives of estimates."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from support.arrays import arrays, numbers
from support.differences import central
from support.frameworks import BACKENDS, each_backend
from support.known import Logistic, equilibrium

import hypergrad as hg
from hypergrad.errors import ArgumentError, UnsupportedOpError


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
        estimator = hg.Implicit(solver, checks=hg.Checks(tolerance=1e9))
        w_ = backend.asarray(w)

        def along(p, h):
            g = hg.hypergradient(told.problem(backend), p, h, train, val, estimator, backend=backend)
            return backend.xp.sum(w_ * g)

        _, pullback = backend.pullback(along, *arrays(backend, theta, lam))
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
        estimator = hg.Implicit(hg.CG(rtol=1e-12), checks=hg.Checks(away="ignore"))
        train, val = told.data(backend)

        def estimate(h):
            return hg.hypergradient(problem, params, h, train, val, estimator, backend=backend)

        _, pullback = backend.pullback(estimate, backend.asarray(0.3))
        (slope,) = pullback(backend.asarray(1.0))
        there, back = (float(backend.to_numpy(estimate(backend.asarray(0.3 + d)))) for d in (1e-5, -1e-5))
        np.testing.assert_allclose(float(backend.to_numpy(slope)), (there - back) / 2e-5, rtol=1e-6)

    @pytest.mark.parametrize(
        "solver",
        [
            hg.Identity(0.3),
            hg.Neumann(3, 0.05),
            hg.Nystrom(2, damping=0.5),
            *(kind(2, rtol=None) for kind in (hg.CG, hg.MINRES, hg.GMRES, hg.BiCGStab)),
        ],
        ids=lambda s: type(s).__name__,
    )
    def test_a_truncation_has_the_derivative_of_its_steps(self, backend, solver):
        told = Logistic(n=4)
        theta, train, val = backend.asarray(told.lam), *told.data(backend)
        estimator = hg.Implicit(solver, checks=hg.Checks(away="ignore"))
        w = backend.asarray(np.arange(1.0, 5.0))

        def along(h):
            g = hg.hypergradient(told.problem(backend), theta, h, train, val, estimator, backend=backend)
            return backend.inner(w, g)

        _, pullback = backend.pullback(along, backend.asarray(told.lam))
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
        estimator = hg.Implicit(hg.GMRES(rtol=1e-12), checks=hg.Checks(tolerance=1e9))

        def along(s):
            h = {**lam, "s": s}
            g = hg.hypergradient(problem, backend.asarray(theta), h, u, y, estimator, backend=backend)
            return backend.xp.sum(w_ * backend.ravel(g)[0])

        value, pullback = backend.pullback(along, lam["s"])
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
            _, pullback = backend.pullback(along, lam)
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
