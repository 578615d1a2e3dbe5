"""Every solver on random linear systems: right to the tolerance asked, or the error that names what is wrong.

A system is drawn by its spectrum, in NumPy, and judged there: A x = v with A = U diag(s) Vᵀ, and V = U where
it is symmetric. A framework that compiles gets a few sizes, and one program for each solver and size.
"""

from functools import cache, partial, wraps
from typing import NamedTuple

import numpy as np
import optree
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.frameworks import COMPILED, affordable, each_backend, program

import hypergrad as hg
from hypergrad.errors import Failure, SolveError
from hypergrad.solvers import System

MANY = settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
FEW = settings(MANY, max_examples=4, phases=[Phase.generate])
SIZES = 1, 40  # for a framework that compiles
STEPS = 2000


def examples(**kwargs):
    """A property tried on as many examples as one can afford."""

    def decorate(test):
        many, few = (profile(given(**kwargs)(test)) for profile in (MANY, FEW))

        @wraps(many)
        def on(*args, backend, **kwargs):
            affordable(backend, many, few)(*args, backend=backend, **kwargs)

        return on

    return decorate


class Drawn(NamedTuple):
    """How to make a system; of which size, the framework has a say in."""

    n: int
    condition: float
    spread: str
    scale: float
    size: float
    warm: bool
    seed: int

    def spectrum(self, rng, n):
        """Numbers in [1/κ, 1], both ends among them where there are two."""
        low = -np.log10(self.condition)
        match self.spread:
            case "even":
                s = np.logspace(low, 0, n) if n > 1 else np.ones(1)
            case "random":
                s = rng.uniform(10**low, 1, n)
                s[:2] = [1, 10**low][:n]
            case "few":  # distinct values
                s = 10 ** rng.choice([low, low / 2, 0], n)
        return self.scale * s

    def system(self, backend, kind):
        n = min(SIZES, key=lambda size: abs(size - self.n)) if backend.name in COMPILED else self.n
        rng = np.random.default_rng(self.seed)
        u, w = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        s, v, x = self.spectrum(rng, n), rng.normal(size=n), rng.normal(size=n)
        if "singular" in kind:
            s[rng.permutation(n)[: 1 + n // 5]] = 0.0
        if "indefinite" in kind:
            s[rng.permutation(n)[: 1 + rng.integers(n)]] *= -1
        a = u @ np.diag(s) @ (w if "general" in kind else u).T
        a = a if "general" in kind else 0.5 * (a + a.T)
        # Half of what a right side holds is out of reach where A is singular; all of it is in reach of
        # none but a consistent one.
        v = a @ v if "consistent" in kind else v
        v = v / max(np.linalg.norm(v), 1e-300)
        start = 0.3 * x / self.scale if self.warm else np.zeros(n)
        return a, self.size * v, self.size * start


systems = st.builds(
    Drawn,
    n=st.integers(1, 60),
    condition=st.sampled_from([1.0, 10.0, 1e2, 1e4, 1e6]),
    spread=st.sampled_from(["even", "random", "few"]),
    scale=st.sampled_from([1.0, 1e-8, 1e8]),
    size=st.sampled_from([1.0, 1e-8, 1e8]),
    warm=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


def cut(backend, vector):
    """A vector as a tree: a number, a matrix of two rows, and the rest, in which there may be nothing."""
    m = (len(vector) - 1) // 3
    parts = {"b": vector[0], "layers": [vector[1 : 1 + 2 * m].reshape(2, m)], "c": vector[1 + 2 * m :]}
    return optree.tree_map(lambda leaf: backend.asarray(np.array(leaf)), parts)


def flat(backend, tree):
    b, c, (w,) = (tree[name] for name in ("b", "c", "layers"))
    return np.concatenate([np.ravel(backend.to_numpy(leaf)) for leaf in (b, w, c)])


def matvec(backend, matrix):
    """A on those trees, whose own order of leaves need not be that of the vector."""
    xp = backend.xp

    def product(p):
        m = p["layers"][0].shape[1]
        whole = (xp.reshape(p["b"], (1,)), xp.reshape(p["layers"][0], (2 * m,)), p["c"])
        q = matrix @ backend.ravel(whole)[0]
        return {"b": q[0], "layers": [xp.reshape(q[1 : 1 + 2 * m], (2, m))], "c": q[1 + 2 * m :]}

    return product


class Outcome(NamedTuple):
    """What came of a solve, in NumPy; ``reason`` is ``None`` for a success."""

    x: np.ndarray
    reason: str | None
    steps: int
    residual: float
    message: str
    solution: object


@cache
def compiled(backend, solver, symmetric):
    """The solve as one program of arrays, whose failures come as codes."""

    def whole(matrix, v, start):
        return hg.solve(matvec(backend, matrix), v, solver, start=start, symmetric=symmetric, backend=backend)

    return program(backend, whole)


def solved(backend, solver, a, v, start, symmetric=True):
    matrix, v, start = backend.asarray(a), cut(backend, v), cut(backend, start)
    reason, message = None, ""
    if backend.name in COMPILED and not isinstance(solver, hg.External):
        found = compiled(backend, solver, symmetric)(matrix, v, start)
    else:
        product = matvec(backend, matrix)
        try:
            found = hg.solve(product, v, solver, start=start, symmetric=symmetric, backend=backend)
        except SolveError as error:
            system = System.begun(backend, lambda p, _: product(p), v, start, symmetric)
            found = solver.solve(backend, system)._replace(residual=error.residual, iterations=error.step)
            reason, message = error.reason, str(error)
    if reason is None and int(found.failure) != Failure.NONE:
        reason = Failure(int(found.failure)).name.lower()
    x = flat(backend, found.x)
    return Outcome(x, reason, int(found.iterations), float(found.residual), message, found)


def true_residual(a, v, x):
    size = np.linalg.norm(v)
    return np.linalg.norm(v - a @ x) / (size if size > 0 else 1.0)


def judge(outcome, a, v, rtol, allowed):
    """Right, or wrong in a way that is allowed; and the residual that is told is the true one."""
    residual = true_residual(a, v, outcome.x)
    rounding = 1e-14 * np.linalg.norm(a, 2) * np.linalg.norm(outcome.x) / np.linalg.norm(v)
    assert abs(outcome.residual - residual) <= 1e-6 * residual + rounding
    if outcome.reason is None:
        assert residual <= rtol + rounding
        if "consistent" not in allowed:
            s = np.linalg.svd(a, compute_uv=False)
            exact = np.linalg.solve(a, v)
            assert np.linalg.norm(outcome.x - exact) <= 10 * s[0] / s[-1] * rtol * np.linalg.norm(exact)
    else:
        assert outcome.reason in allowed, f"{outcome.reason} after {outcome.steps} steps, at {residual:.1e}"
        assert outcome.reason != "max_steps" or residual > rtol - rounding


def dense(product, v):
    return np.linalg.lstsq(np.stack([product(e) for e in np.eye(v.size)], 1), v, rcond=1e-12)[0]


def of(rtol):
    """Every solver that can be asked for a tolerance, with steps to spare."""
    return {
        "CG": hg.CG(STEPS, rtol),
        "CG-Nystrom": hg.CG(STEPS, rtol, preconditioner=hg.Nystrom(10, damping=1e-9)),
        "CG-Diagonal": hg.CG(STEPS, rtol, preconditioner=hg.Diagonal(10)),
        "MINRES": hg.MINRES(STEPS, rtol),
        "GMRES": hg.GMRES(STEPS, rtol, restart=60),
        "GMRES-restarted": hg.GMRES(70, rtol, restart=7),
        "BiCGStab": hg.BiCGStab(300, rtol),
        "Neumann": hg.Neumann(100, rtol=rtol),
        "Nystrom": hg.Nystrom(60, damping=1e-12, rtol=rtol),
        "Diagonal": hg.Diagonal(10, rtol=rtol),
        "Direct": hg.Direct(rtol=rtol),
        "External": hg.External(dense, rtol=rtol, on_host=True),
    }


# What may go wrong in each kind of system; where a row is empty, the solver must succeed.
SLOW = {"max_steps"}
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
        "BiCGStab": {"singular", "max_steps", "breakdown"},
        **dict.fromkeys(["Diagonal", "External"], {"singular", "max_steps"}),
    },
    "singular indefinite": {
        **dict.fromkeys(["MINRES", "GMRES"], {"singular"}),
        **dict.fromkeys(["CG", "Direct"], {"singular", "negative_curvature"}),
    },
    "singular consistent": {
        **dict.fromkeys(["CG", "MINRES", "GMRES", "Direct"], {"singular", "consistent"}),
        "BiCGStab": {"max_steps", "breakdown", "singular", "consistent"},
    },
    "general": {
        **dict.fromkeys(["GMRES", "Direct", "External"], set()),
        "GMRES-restarted": SLOW,
        "BiCGStab": {"max_steps", "breakdown"},
        "Neumann": {"max_steps", "diverged"},
    },
    "general singular": {
        **dict.fromkeys(["GMRES", "Direct"], {"singular"}),
        "BiCGStab": {"max_steps", "breakdown"},
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
        after = hg.Amortised(0.1).remembered(backend, backend.asarray(x), backend.asarray(r))
        np.testing.assert_allclose(backend.to_numpy(after), x + 0.1)


def definite(n, condition, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = q @ np.diag(np.logspace(0, np.log10(condition), n)) @ q.T
    return 0.5 * (a + a.T), rng.normal(size=n), rng.normal(size=n)


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
            system = System.begun(backend, lambda p, _: product(p), v, start)
            return [cg(k).solve(backend, system).x for k in range(1, n + 1)]

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

    def test_who_does_not_look_says_so(self, backend):
        a, v, start = definite(5, 10.0)
        for solver in (hg.BiCGStab(), hg.Neumann(200, rtol=1e-6), hg.Identity()):
            assert np.isnan(float(solved(backend, solver, a, v, start).solution.smallest))
