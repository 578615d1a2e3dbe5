"""Estimates on random problems against the dense formulas of the textbook, and closed forms."""

from functools import partial

import numpy as np
import pytest
from hypergrad_numpy import textbook
from hypothesis import strategies as st
from support.frameworks import each_backend
from support.random_problems import (
    RULES,
    Drawn,
    T,
    agree,
    anywhere,
    cut,
    estimate,
    every_rule,
    flat,
    hundred,
    hypergradient,
    once,
    problems,
    seeds,
    skeletons,
)

import hypergrad as hg
from hypergrad.solvers import System


@once
def greedy(p, ahead):
    letter = textbook.greedy_literal(*p.vectors, lookahead=ahead, eta=0.1)
    return letter, textbook.greedy(*p.vectors, eta=0.1, lookahead=ahead)


@once
def unrolled(p, rule, truncate):
    n, (Phi, z) = p.theta.size, RULES[rule].on(p)
    trained = textbook.trajectory(Phi, z, p.lam, p.train)[T][:n]
    return trained, textbook.unrolled(Phi, p.costs[1], z, p.lam, p.train, p.val, n, truncate)


@once
def implicit(p, damping=0.0):
    return textbook.implicit(p.mean, p.costs[1], p.theta, p.lam, p.train, p.val, damping)


@once
def lowest_curvature(p):
    return float(np.linalg.eigvalsh(textbook.hessian(p.mean, p.theta, p.lam, p.train))[0])


@each_backend
class TestTextbook:  # the dense formulas, to 1e-10
    @hundred(problems(), st.booleans())
    def test_greedy(self, backend, p, ahead):
        one_step = partial(hg.Greedy, hg.SGD(0.1), lookahead=ahead)
        letter, expected = greedy(p, ahead)
        agree(hypergradient(backend, p, one_step()), expected, 1e-10)
        agree(hypergradient(backend, p, one_step(response="gradient")), letter, 1e-10)

    @every_rule
    @hundred(p=problems(), truncate=st.sampled_from([None, 1, 2]))
    def test_unrolled(self, backend, rule, p, truncate):
        out = estimate(backend, p, hg.Unrolled(rule.update, T, truncate=truncate))
        name = next(name for name, known in RULES.items() if known is rule)
        trained, expected = unrolled(p, name, truncate)
        agree(flat(out.state.params, backend), trained, 1e-10)
        agree(flat(out.hypergradient, backend), expected, 1e-10)

    @hundred(problems("quadratic"))
    def test_implicit(self, backend, p):
        agree(hypergradient(backend, p, anywhere(hg.Direct())), implicit(p), 1e-10)

    @hundred(problems(), st.floats(0.1, 10.0))
    def test_implicit_with_damping(self, backend, p, margin):
        damping = margin + max(0.0, -lowest_curvature(p))
        estimator = anywhere(hg.Damped(hg.Direct(), damping))
        agree(hypergradient(backend, p, estimator), implicit(p, damping), 1e-10)

    @hundred(problems())
    def test_the_iterates_of_conjugate_gradients(self, backend, p):
        H = textbook.hessian(p.costs[0], p.theta, p.lam, p.train[0])
        H, n = H @ H + np.eye(len(H)), len(H)
        A, v = backend.asarray(H), backend.map(backend.asarray, p.params)
        _, tree = backend.ravel(v)
        system = System(backend, lambda x: tree(A @ backend.ravel(x)[0]), v)
        for k, x in enumerate(textbook.conjugate_gradients(H, p.theta, n), start=1):
            found = hg.CG(max_steps=k, rtol=1e-15).solve(system).x
            agree(flat(found, backend), x, 1e-10)


@each_backend
class TestClosedForm:
    @hundred(skeletons, seeds)
    def test_ridge_regression_with_a_penalty_for_each_feature(self, backend, skeleton, seed):
        rng, n = np.random.default_rng(seed), flat(skeleton).size
        X1, X2, y1, y2, lam = (rng.normal(size=size) for size in ((8, n), (8, n), 8, 8, n))

        def error(xp, theta, lam, batch):
            return 0.5 * xp.mean((batch[0] @ theta - batch[1]) ** 2)

        def ridge(xp, theta, lam, batch):
            return error(xp, theta, lam, batch) + 0.5 * xp.sum(xp.exp(lam) * theta**2)

        H = X1.T @ X1 / 8 + np.diag(np.exp(lam))
        theta = np.linalg.solve(H, X1.T @ y1 / 8)
        p = Drawn(ridge, error, theta, lam, cut(theta, skeleton), cut(lam, skeleton), [(X1, y1)], (X2, y2))
        expected = -np.exp(lam) * theta * np.linalg.solve(H, X2.T @ (X2 @ theta - y2) / 8)
        for solver in (hg.Direct(), hg.CG(rtol=1e-12)):
            agree(hypergradient(backend, p, hg.Implicit(solver)), expected, 1e-10)

    @pytest.mark.parametrize("rule", [hg.Adam, partial(hg.AdamW, weight_decay=0.0), hg.RMSprop])
    @hundred(skeleton=skeletons, seed=seeds, steps=st.integers(1, 3))
    def test_a_gradient_of_exactly_zero(self, backend, rule, skeleton, seed, steps):
        # C̃1 = λᵀθ at λ = 0: each step is −η λ / (|λ| + ε) up to O(λ²), whatever the betas.
        rng, lam = np.random.default_rng(seed), np.zeros(flat(skeleton).size)
        theta, c = rng.normal(size=(2, lam.size))
        costs = (lambda xp, theta, lam, _: lam @ theta, lambda xp, theta, lam, c: c @ theta)
        p = Drawn(*costs, theta, lam, cut(theta, skeleton), cut(lam, skeleton), [None], c)
        for estimator in (hg.Unrolled(rule(lr=0.1, eps=0.01), steps), hg.Greedy(rule(lr=0.1, eps=0.01))):
            agree(hypergradient(backend, p, estimator), -estimator.training_steps * 10.0 * c, 1e-12)
