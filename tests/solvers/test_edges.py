"""Edges: a right side of zeros, too few steps, no promise."""

import numpy as np
import pytest
from support.frameworks import COMPILED, each_backend
from support.random_systems import definite, judge, of, solved, true_residual

import hypergrad as hg


@each_backend
class TestEdges:
    @pytest.mark.parametrize("warm", [False, True])
    @pytest.mark.parametrize("name", [name for name in of(0.1) if name != "Direct"])
    def test_the_solution_of_a_right_side_of_zeros_is_zero(self, backend, name, warm):
        a, _, x = definite(5, 10.0)
        outcome = solved(backend, of(1e-6)[name], a, np.zeros(5), warm * x)
        assert outcome.reason is None and not outcome.x.any() and outcome.residual == 0

    @pytest.mark.parametrize("name", ["CG", "MINRES", "GMRES"])
    def test_at_a_least_squares_solution_a_singular_system_is_singular_still(self, backend, name):
        a, v, _ = definite(5, 10.0)
        values, q = np.linalg.eigh(a)
        a = q[:, 1:] @ np.diag(values[1:]) @ q[:, 1:].T
        a = 0.5 * (a + a.T)
        best = np.linalg.lstsq(a, v, rcond=1e-12)[0]
        assert solved(backend, of(1e-6)[name], a, v, best).reason == "singular"

    @pytest.mark.parametrize(
        "solver",
        [
            hg.CG(3, 1e-9),
            hg.MINRES(3, 1e-9),
            hg.GMRES(3, 1e-9),
            hg.GMRES(5, 1e-9, restart=2),
            hg.BiCGStab(4, 1e-9),
            hg.Neumann(3, rtol=1e-9),
            hg.Nystrom(2, rtol=1e-9),
            hg.External(lambda product, v: product(v), rtol=1e-9, on_host=True),
        ],
        ids=lambda solver: type(solver).__name__,  # a lambda has no name that workers share
    )
    def test_out_of_steps(self, backend, solver):
        a, v, start = definite(9, 100.0)
        outcome = solved(backend, solver, a, v, start)
        judge(outcome, a, v, 1e-9, {"max_steps"})
        assert outcome.reason == "max_steps"
        assert outcome.steps <= 5

    @pytest.mark.parametrize("solver", [hg.Identity(0.1), hg.Neumann(3), hg.Amortised(0.1), hg.Nystrom(2)])
    def test_what_promises_nothing_tells_its_residual(self, backend, solver):
        a, v, start = definite(9, 100.0)
        outcome = solved(backend, solver, a, v, start)
        assert outcome.reason is None
        assert abs(outcome.residual - true_residual(a, v, outcome.x)) <= 1e-9 * outcome.residual
        if solver == hg.Identity(0.1):
            np.testing.assert_allclose(outcome.x, start + 0.1 * (v - a @ start))

    def test_reasons_come_with_remedies(self, backend):
        h, v, start = definite(6, 10.0)
        if backend.name in COMPILED:
            return
        for a, solver, remedy in [
            (h - 2 * np.eye(6), hg.CG(), "MINRES"),
            (np.diag([1.0, 2, 3, 4, 5, 0]), hg.MINRES(), "δI"),
            (h, hg.CG(2), "max_steps"),
        ]:
            assert remedy in solved(backend, solver, a, v, start).message
