"""What the estimators must say about one another, on random problems."""

from functools import partial

import numpy as np
from hypergrad_numpy import textbook
from hypothesis import strategies as st
from support.frameworks import each_backend
from support.random_problems import (
    T,
    agree,
    anywhere,
    cut,
    estimate,
    estimators,
    every_rule,
    flat,
    hundred,
    hypergradient,
    linear_estimators,
    problems,
    rules,
)

import hypergrad as hg


@each_backend
class TestIdentities:  # what the estimators must say about one another
    @every_rule
    @hundred(p=problems())
    def test_greedy_is_one_step_of_unrolled(self, backend, rule, p):
        warm = estimate(backend, p, hg.Unrolled(rule.update, 2)).state
        one = estimate(backend, p, hg.Greedy(rule.update), warm)
        other = estimate(backend, p, hg.Unrolled(rule.update, 1), warm)
        for result in ("hypergradient", "state"):
            agree(*(flat(getattr(out, result), backend) for out in (one, other)), 1e-12)

    @hundred(problems(), rules, st.integers(0, T))
    def test_truncation_beyond_the_start_is_none(self, backend, p, rule, more):
        full, truncated = hg.Unrolled(rule.update, T), hg.Unrolled(rule.update, T, truncate=T + more)
        agree(hypergradient(backend, p, truncated), hypergradient(backend, p, full), 1e-12)

    @hundred(problems(), rules, st.sampled_from([None, 1, 2]))
    def test_a_tape_of_states_is_as_good_as_a_full_one(self, backend, p, rule, truncate):
        full, states = (hg.Unrolled(rule.update, T, truncate, tape) for tape in (hg.Full(), hg.States()))
        agree(hypergradient(backend, p, states), hypergradient(backend, p, full), 1e-12)

    @hundred(problems("quadratic"), st.integers(1, 5), st.integers(0, 2))
    def test_neumann_terms_at_a_fixed_point_are_the_last_steps(self, backend, p, terms, more):
        at = (p.costs[0], p.theta, p.lam, p.train[0])  # a quadratic's minimum is one Newton step away
        theta = p.theta - np.linalg.solve(textbook.hessian(*at), textbook.nabla_theta(*at))
        p = p._replace(train=p.train[:1], theta=theta, params=cut(theta, p.params))
        series = hypergradient(backend, p, hg.Implicit(hg.Neumann(terms, step_size=0.1)))
        unrolled = hg.Unrolled(hg.SGD(0.1), terms + more, truncate=terms)
        agree(series, hypergradient(backend, p, unrolled), 1e-10)
        agree(series, textbook.neumann(*p.vectors, eta=0.1, terms=terms), 1e-10)

    @hundred(problems("quadratic"))
    def test_solvers_that_converge_are_direct(self, backend, p):
        direct = hypergradient(backend, p, anywhere(hg.Direct()))
        for solver in (hg.CG(rtol=1e-10), hg.Neumann(5000, rtol=1e-10)):
            agree(hypergradient(backend, p, anywhere(solver)), direct, 1e-8)

    @hundred(problems(), linear_estimators, st.floats(-3, 3), st.floats(-3, 3))
    def test_linear_in_the_validation_loss(self, backend, p, estimator, a, b):
        other = lambda xp, theta, lam, _: xp.sum(xp.sin(theta)) + xp.sum(xp.cos(lam))  # noqa: E731
        both = lambda *at: a * p.outer(*at) + b * other(*at)  # noqa: E731
        of = partial(hypergradient, backend, p, estimator)
        agree(of(outer=both), a * of() + b * of(outer=other), 1e-12)

    @hundred(problems(), estimators)
    def test_indifferent_to_how_a_vector_is_cut_into_leaves(self, backend, p, estimator):
        whole = hypergradient(backend, p, estimator, params=p.theta, hparams=p.lam)
        agree(hypergradient(backend, p, estimator), whole, 1e-12)
