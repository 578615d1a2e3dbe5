"""The Neumann series: steps too large, negative curvature, contractions."""

import numpy as np
from hypothesis import strategies as st
from support.frameworks import COMPILED, affordable, each_backend
from support.random_systems import definite, examples, judge, solved

import hypergrad as hg


class TestNeumann:
    @each_backend
    @examples(
        n=st.integers(2, 30),
        condition=st.sampled_from([2.0, 1e2, 1e6]),
        excess=st.sampled_from([1.1, 1.5, 4.0, 100.0]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_too_large_a_step_is_found_and_the_largest_stable_one_named(
        self, backend, n, condition, excess, seed
    ):
        n, excess = affordable(backend, n, 5), affordable(backend, excess, 4.0)
        h, _, start = definite(n, condition, seed)
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], n)
        h, v, stable = h / condition, np.linalg.eigh(h)[1] @ signs, 2.0  # a share of each direction
        step, term, sizes = excess * stable, v, [np.linalg.norm(v)]
        while len(sizes) < 4 or not all(np.diff(sizes[-4:]) > 0):
            term = term - step * h @ term
            sizes.append(np.linalg.norm(term))
        solver = hg.Neumann(1000, step_size=step, rtol=1e-9)
        outcome = solved(backend, solver, h, v, 0 * start)
        assert (outcome.reason, outcome.steps) == ("diverged", len(sizes) - 1)
        named = 2 / float(outcome.solution.curvature)
        assert stable * (1 - 1e-9) <= named < step
        assert abs(named - stable) <= 0.25 * stable
        if backend.name not in COMPILED:
            assert f"step_size < {named:.1e}" in outcome.message

    @each_backend
    def test_negative_curvature_is_told_from_too_large_a_step(self, backend):
        h, v, start = definite(6, 10.0)
        lowest = h - 2 * np.eye(6)
        outcome = solved(backend, hg.Neumann(1000, step_size=0.02, rtol=1e-9), lowest, v, 0 * start)
        assert outcome.reason == "negative_curvature"

    @each_backend
    def test_a_contraction(self, backend):
        rng = np.random.default_rng(2)
        a, v = np.eye(7) - 0.6 * np.linalg.qr(rng.normal(size=(7, 7)))[0], rng.normal(size=7)
        outcome = solved(backend, hg.Neumann(100, rtol=1e-8), a, v, 0 * v, symmetric=False)
        judge(outcome, a, v, 1e-8, set())
