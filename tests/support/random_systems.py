"""Random linear systems, solved and judged.

A system is drawn by its spectrum, in NumPy, and judged there: A x = v with A = U diag(s) Vᵀ, and V = U where
it is symmetric. A framework that compiles gets a few sizes, and one program for each solver and size.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import optree
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad.errors import Failure, SolveError
from hypergrad.solvers import System
from hypergrad.solvers.solve import solve_system
from support.examples import tried
from support.frameworks import COMPILED, program
from support.nightly import NIGHTLY, rounds

MANY = settings(
    max_examples=rounds(12, 120),
    derandomize=not NIGHTLY,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
FEW = settings(MANY, max_examples=4, phases=[Phase.generate])
examples = tried(MANY, FEW)
SIZES = 1, 40  # for a framework that compiles
STEPS = 2000


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
    """The solve as one program: failures come as codes, with the x that `hg.solve` withholds."""

    def whole(matrix, v, start):
        system = System(backend, matvec(backend, matrix), v, symmetric, x=start)
        return solve_system(solver, system)[0]

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
            system = System(backend, product, v, symmetric, x=start)
            found = solver.solve(system)._replace(residual=error.residual, iterations=error.step)
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


def definite(n, condition, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = q @ np.diag(np.logspace(0, np.log10(condition), n)) @ q.T
    return 0.5 * (a + a.T), rng.normal(size=n), rng.normal(size=n)
