"""Solvers step by step, against the recurrences of textbooks."""

from functools import partial

import numpy as np
import pytest
from hypothesis import strategies as st
from support.frameworks import affordable, each_backend, program
from support.random_systems import cut, definite, examples, flat, matvec, solved

import hypergrad as hg
from hypergrad.solvers import System


def conjugate_gradients(h, v, x, m, steps):
    """Every iterate of the textbook's recurrence, preconditioned by M ≈ H⁻¹."""
    iterates, r = [], v - h @ x
    z = p = m @ r
    for _ in range(steps):
        alpha = (r @ z) / (p @ h @ p)
        x, rz = x + alpha * p, r @ z
        r = r - alpha * h @ p
        z = m @ r
        p = z + (r @ z) / rz * p
        iterates.append(x)
    return iterates


@each_backend
class TestConjugateGradients:
    @pytest.mark.parametrize("preconditioned", [False, True])
    @examples(
        n=st.integers(1, 8), condition=st.sampled_from([1.5, 4.0, 10.0]), seed=st.integers(0, 2**32 - 1)
    )
    def test_step_by_step(self, backend, preconditioned, n, condition, seed):
        n = affordable(backend, n, 5)
        h, v, start = definite(n, condition, seed)
        root = np.random.default_rng(seed).normal(size=(n, n))
        m = root @ root.T / n + np.eye(n) if preconditioned else np.eye(n)

        def iterates(matrix, m, v, start):
            product = matvec(backend, matrix)
            cg = partial(hg.CG, rtol=1e-15, preconditioner=matvec(backend, m) if preconditioned else None)
            system = System(backend, product, v, x=start)
            return [cg(k).solve(system).x for k in range(1, n + 1)]

        given_ = backend.asarray(h), backend.asarray(m), cut(backend, v), cut(backend, start)
        found = program(backend, iterates)(*given_)
        for x, expected in zip(found, conjugate_gradients(h, v, start, m, n), strict=True):
            # Where there are more and unlike directions, two ways to round go apart, both of them textbooks'.
            assert np.linalg.norm(flat(backend, x) - expected) <= 1e-9 * np.linalg.norm(expected)


def stabilised(a, v, steps):
    """Every iterate of van der Vorst's recurrence, from 0."""
    x, r, p, ap, rho, alpha, omega, iterates = 0 * v, v, 0 * v, 0 * v, 1.0, 1.0, 1.0, []
    for _ in range(steps):
        beta, rho = (v @ r) / rho * alpha / omega, v @ r
        p = r + beta * (p - omega * ap)
        ap = a @ p
        alpha = rho / (v @ ap)
        s = r - alpha * ap
        omega = (a @ s) @ s / ((a @ s) @ (a @ s))
        x, r = x + alpha * p + omega * s, s - omega * a @ s
        iterates.append(x)
    return iterates


@each_backend
def test_stabilised_biconjugate_gradients_step_by_step(backend):
    a, v, _ = definite(9, 3.0)
    a = a + np.triu(a, 1)
    for k, expected in enumerate(stabilised(a, v, 4), start=1):
        outcome = solved(backend, hg.BiCGStab(2 * k, rtol=1e-15), a, v, 0 * v, symmetric=False)
        np.testing.assert_allclose(outcome.x, expected, rtol=1e-9)
