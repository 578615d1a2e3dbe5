"""Systems that no solver can solve, and estimates away from the optimum."""

import re

import autograd
import numpy as np
import pytest
from numpy.testing import assert_allclose
from support.faults import SOLVERS, batches, estimate, refused, ridge, says, strengths, weights

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


def solve(backend, solver, hessian, **options):
    """Where ∇C̃1 = 0 and ∇C2 = (1, 1, …): the sum of H⁻¹ ∇C2 as the estimate has it, and the report."""
    H = backend.asarray(hessian)
    inner = lambda p, h, b: 0.5 * p["w"] @ H @ p["w"] + h["x"] * p["w"].sum()  # noqa: E731
    start = {"params": {"w": np.zeros(len(hessian))}, "hparams": {"x": np.array(0.0)}, "train": [None]}
    problem = hg.Bilevel(inner, lambda p, h, b: p["w"].sum())
    out = estimate(backend, hg.Implicit(solver, **options), problem, **start)
    return -out.hypergradient["x"], out.report


def unsolved(backend, solver, hessian):
    return refused(errors.SolveError, ArithmeticError, solve, backend, solver, hessian)


def rotated(*eigenvalues):
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(len(eigenvalues),) * 2))
    return q @ np.diag(eigenvalues) @ q.T


class TestLinearSolve:
    @parametrize("solver", SOLVERS[:2], ids=repr)
    @parametrize("scale", [1e-6, 1.0, 1e6])
    @parametrize("hessian", [np.diag([1.0, 0.0]), rotated(3.0, 2.0, 1.0, 0.0)], ids=["2", "4"])
    def test_singular(self, backend, solver, scale, hessian):
        error = unsolved(backend, solver, scale * hessian)
        assert error.reason == "singular" and error.residual > 1e-3
        says(error, "hg.Damped")
        with pytest.warns(errors.SolveWarning, match="hg.Damped"):
            assert (
                solve(backend, solver, scale * hessian, checks=hg.Checks(unsolved="warn"))[1].solve.residual
                > 1e-3
            )

    def test_singular_but_damped_or_consistent(self, backend):
        damped, _ = solve(backend, hg.Damped(hg.CG(), 0.1), np.diag([1.0, 0.0]))
        assert_allclose(damped, 1 / 1.1 + 1 / 0.1, rtol=1e-9)
        assert_allclose(solve(backend, hg.CG(), np.ones((2, 2)))[0], 1.0, rtol=1e-12)

    @parametrize("solver", SOLVERS[:2], ids=repr)
    @parametrize("eigenvalues", [(2.0, -1.0), (1.0, -1.0), (-1.0, -1.0), (3.0, 2.0, -1.0)], ids=repr)
    def test_indefinite(self, backend, solver, eigenvalues):
        for hessian in (np.diag(eigenvalues), rotated(*eigenvalues)):
            error = unsolved(backend, solver, hessian)
            assert error.reason == "negative_curvature" and 1 <= error.step <= len(hessian)
            says(error, "hg.Damped")
            unsolved(backend, hg.Neumann(100, 0.1, rtol=1e-6), hessian)

    def test_out_of_steps_gives_the_true_residual(self, backend):
        hessian, v = rotated(1.0, 2.0, 5.0, 9.0, 20.0), np.ones(5)
        krylov = np.stack([v, hessian @ v], axis=1)  # the x of CG minimises over this space
        left = v - hessian @ krylov @ np.linalg.solve(krylov.T @ hessian @ krylov, krylov.T @ v)
        error = unsolved(backend, hg.CG(max_steps=2), hessian)
        assert (error.reason, error.step) == ("max_steps", 2)
        assert_allclose(error.residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-9)
        says(error, "max_steps", "hg.Damped", "hg.Checks(unsolved=", f"{error.residual:.1e}")
        left, error = v - 0.05 * hessian @ v, unsolved(backend, hg.Neumann(1, 0.05, 1e-6), hessian)
        assert (error.reason, error.step) == ("max_steps", 1)
        assert_allclose(error.residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-9)

    def test_the_residual_of_the_recurrence_is_not_believed(self, backend):
        assert unsolved(backend, hg.CG(1000, rtol=1e-15), rotated(*np.logspace(0, 10, 12))).residual > 1e-15

    def test_neumann_diverges(self, backend):
        error = unsolved(backend, hg.Neumann(100, 1.0), np.diag([1.0, 10.0]))
        assert error.reason == "diverged" and error.step <= 4
        numbers = [float(n) for n in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", str(error))]
        assert any(abs(n - 0.2) < 0.01 for n in numbers), f"the stable step 2/λmax = 0.2 is not in:\n{error}"
        found, _ = solve(backend, hg.Neumann(400, 0.19, 1e-9), np.diag([1.0, 10.0]))
        assert_allclose(found, 1.1, rtol=1e-7)


class TestImplicitAwayFromTheOptimum:
    def test_warns_or_fails_with_the_gradient_norm_and_the_tolerance(self, backend):
        batch = batches()[0]
        norm = np.linalg.norm(autograd.grad(lambda w: ridge({"w": w}, strengths(), batch))(weights()["w"]))
        with pytest.warns(errors.InnerNotConvergedWarning) as caught:
            out = estimate(backend, hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=1e-3)), train=batch)
        strict = hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=1e-3, away="raise"))
        error = refused(
            errors.InnerNotConvergedError, ArithmeticError, estimate, backend, strict, train=batch
        )
        norms = [backend.to_numpy(out.report.inner_gradient_norm), error.gradient_norm]
        assert_allclose(norms, norm, rtol=1e-12)
        assert error.tolerance == 1e-3
        for message in (caught[0].message, error):
            says(message, f"{norm:.1e}", "1.0e-03")
