"""Every solver on random linear systems: right to the tolerance asked, or it says what is wrong."""

import numpy as np
import pytest
from hypothesis import strategies as st
from support.frameworks import affordable, each_backend
from support.random_systems import definite, examples, judge, of, solved, systems

import hypergrad as hg
from hypergrad.solvers import System

# What may go wrong in each kind of system; where a row is empty, the solver must succeed.
SLOW = {"max_steps"}
UNSTEADY = {"max_steps", "breakdown", "stagnation"}
"""Where A is singular, the x of BiCGStab may become so large that its residual is no longer the true one."""
TRANSPOSED = {
    "definite": {
        **dict.fromkeys(["CG", "CG-Nystrom", "CG-Diagonal", "MINRES", "GMRES", "Direct", "External"], set()),
        **dict.fromkeys(["GMRES-restarted", "Nystrom", "Diagonal"], SLOW),
        "BiCGStab": {"max_steps", "breakdown"},
        "Neumann": {"max_steps", "diverged"},
    },
    "indefinite": {
        **dict.fromkeys(["MINRES", "GMRES", "External"], set()),
        **dict.fromkeys(["CG", "CG-Nystrom", "CG-Diagonal", "Direct"], {"negative_curvature"}),
        "GMRES-restarted": SLOW,
        "BiCGStab": {"max_steps", "breakdown"},
        "Neumann": {"max_steps", "diverged", "negative_curvature"},
        "Nystrom": {"max_steps", "negative_curvature"},
        "Diagonal": SLOW,
    },
    "singular": {
        **dict.fromkeys(["CG", "CG-Nystrom", "CG-Diagonal", "MINRES", "GMRES", "Direct"], {"singular"}),
        **dict.fromkeys(["GMRES-restarted", "Neumann", "Nystrom"], {"singular", "max_steps", "diverged"}),
        "BiCGStab": {"singular"},
        **dict.fromkeys(["Diagonal", "External"], {"singular", "max_steps"}),
    },
    "singular indefinite": {
        **dict.fromkeys(["MINRES", "GMRES"], {"singular"}),
        **dict.fromkeys(["CG", "Direct"], {"singular", "negative_curvature"}),
    },
    "singular consistent": {
        **dict.fromkeys(["CG", "MINRES", "GMRES", "Direct"], {"singular", "consistent"}),
        "BiCGStab": {"singular", "consistent", "max_steps"},
    },
    "general": {
        **dict.fromkeys(["GMRES", "Direct", "External"], set()),
        "GMRES-restarted": SLOW,
        "BiCGStab": {"max_steps", "breakdown"},
        "Neumann": {"max_steps", "diverged"},
    },
    "general singular": {
        **dict.fromkeys(["GMRES", "Direct"], {"singular"}),
        "BiCGStab": UNSTEADY,
    },
}
ROWS = [(kind, name, allowed) for kind, row in TRANSPOSED.items() for name, allowed in row.items()]
each_row = pytest.mark.parametrize("kind, name, allowed", ROWS, ids=[f"{k}-{n}" for k, n, _ in ROWS])


@each_backend
class TestAgainstDense:
    @each_row
    @examples(drawn=systems, rtol=st.sampled_from([1e-3, 1e-6, 1e-8]))
    def test_right_or_told(self, backend, kind, name, allowed, drawn, rtol):
        rtol = affordable(backend, rtol, 1e-6)
        a, v, start = drawn.system(backend, kind)
        if not v.any():
            return
        outcome = solved(backend, of(rtol)[name], a, v, start, symmetric="general" not in kind)
        # The residual of MINRES drifts from the true one by κ²ε (Sleijpen, van der Vorst, Modersitzki 2000).
        if name == "MINRES" and rtol <= drawn.condition**2 * np.finfo(float).eps:
            allowed = allowed | {"stagnation"}
        judge(outcome, a, v, rtol, allowed)
        if kind == "singular" or kind == "general singular":
            assert outcome.reason is not None
        if kind == "indefinite" and allowed == {"negative_curvature"}:
            assert outcome.reason == "negative_curvature"


@each_backend
class TestWellPosed:
    @pytest.mark.parametrize("name", of(0.1))
    def test_everyone_succeeds(self, backend, name):
        a, v, start = definite(9, 3.0)
        a = np.diag(np.diag(a)) if name == "Diagonal" else a
        outcome = solved(backend, of(1e-8)[name], a, v, start)
        judge(outcome, a, v, 1e-8, set())
        if name in ("CG", "MINRES", "GMRES", "BiCGStab"):
            assert outcome.steps <= 9  # as many as there are unknowns

    @pytest.mark.parametrize("name", ["GMRES", "GMRES-restarted", "BiCGStab", "Direct"])
    def test_without_symmetry(self, backend, name):
        a, v, start = definite(9, 3.0)
        a = a + np.triu(a, 1)
        judge(solved(backend, of(1e-8)[name], a, v, start, symmetric=False), a, v, 1e-8, set())

    def test_one_step_of_amortised_is_remembered(self, backend):
        x, r = np.arange(3.0), np.ones(3)
        v, x = backend.asarray(2.0 * x + r), backend.asarray(x)
        solution = hg.Amortised(0.1).solve(System(backend, lambda p: 2.0 * p, v), x)
        np.testing.assert_allclose(backend.to_numpy(solution.x), backend.to_numpy(x))
        np.testing.assert_allclose(backend.to_numpy(solution.memory), backend.to_numpy(x) + 0.1)


@each_backend
class TestCurvature:
    @pytest.mark.parametrize("name", ["CG", "CG-Diagonal", "MINRES", "GMRES", "Direct"])
    @examples(drawn=systems)
    def test_the_smallest_and_the_largest(self, backend, name, drawn):
        a, v, start = drawn.system(backend, "definite")
        found = solved(backend, of(1e-6)[name], a, v, start).solution
        s = np.linalg.svd(a, compute_uv=False)
        if int(found.iterations) == 0:
            assert np.isnan(float(found.smallest))
            return
        low, high = float(found.smallest), float(found.curvature)
        assert s[-1] * (1 - 1e-6) <= low and high <= s[0] * (1 + 1e-6)
        if name == "Direct":
            assert abs(low - s[-1]) <= 1e-9 * s[0]

    @pytest.mark.parametrize("name", ["CG", "MINRES", "GMRES", "Direct"])
    def test_the_smallest_is_come_near_to(self, backend, name):
        a, v, start = definite(8, 100.0)
        low = float(solved(backend, of(1e-6)[name], a, v, 0 * start).solution.smallest)
        assert 1 - 1e-9 <= low <= 3

    @pytest.mark.parametrize("solver", [hg.CG(), hg.MINRES(), hg.GMRES(), hg.BiCGStab()], ids=repr)
    @pytest.mark.parametrize("known", [1e-3, 50.0])
    def test_what_is_known_of_the_largest_before_it_counts(self, backend, solver, known):
        a, v, _ = definite(5, 10.0)
        matrix = backend.asarray(a)
        found = float(
            solver.solve(System(backend, lambda p: matrix @ p, backend.asarray(v), curvature=known)).curvature
        )
        assert found == known if known > 10 else known < found <= 10 * (1 + 1e-9)

    def test_who_does_not_look_says_so(self, backend):
        a, v, start = definite(5, 10.0)
        for solver in (hg.BiCGStab(), hg.Neumann(200, rtol=1e-6), hg.Identity()):
            assert np.isnan(float(solved(backend, solver, a, v, start).solution.smallest))
