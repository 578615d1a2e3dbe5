"""What decides that a solve succeeded, or why it failed: small systems with one right answer each."""

from dataclasses import dataclass

import numpy as np
import pytest
from support.frameworks import each_backend

import hypergrad as hg
from hypergrad.errors import Failure, SolveError
from hypergrad.solvers import Solution, Solver, System
from hypergrad.solvers.diagnosis import diagnosis

RTOL = 1e-6
MATRIX, RIGHT = np.diag([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])
EXACT = RIGHT / np.diag(MATRIX)


@dataclass(frozen=True)
class Believer(Solver):
    """It returns a given x, and says that all went well."""

    x: tuple
    has_residual = True
    rtol: float = RTOL

    def solve(self, system, memory=None):
        backend = system.backend
        like = backend.flatten(system.v)[0][0]
        return Solution(backend.asarray(np.array(self.x), like=like), 1, 1, 0, 0.0 * like[0] + 4.0)


def solved(backend, solver, a=MATRIX, v=RIGHT, symmetric=True):
    a, v = backend.asarray(a), backend.asarray(v)
    return hg.solve(lambda p: a @ p, v, solver, symmetric=symmetric)


def reason(backend, solver, a=MATRIX, v=RIGHT, symmetric=True):
    with pytest.raises(SolveError) as caught:
        solved(backend, solver, a, v, symmetric)
    return caught.value


def off_by(residual):
    """An x of which ‖Ax − v‖/‖v‖ is this."""
    return tuple(EXACT + residual * np.linalg.norm(RIGHT) * np.array([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("failure", "fact"),
    [
        (Failure.MAX_STEPS, "the inverse-Hessian solve stopped at relative residual 2.0e-03"),
        (Failure.STAGNATION, "rounding keeps the inverse-Hessian solve at relative residual 2.0e-03"),
        (Failure.BREAKDOWN, "CG broke down after 7 iterations, at relative residual 2.0e-03"),
        (Failure.DIVERGED, "the series of CG diverged after 7 terms, at relative residual 2.0e-03"),
        (Failure.NEGATIVE_CURVATURE, "the Hessian is not positive definite: CG found negative curvature"),
        (Failure.SINGULAR, "the Hessian is singular"),
    ],
)  # fmt: skip
def test_each_failure_of_a_hypergradient_opens_with_its_fact(failure, fact):
    text = diagnosis(failure, hg.CG(rtol=RTOL), 7, 2e-3, 1e-5, 4.0)
    assert text.startswith(fact) and "(a)" in text


@each_backend
def test_a_residual_that_is_orthogonal_to_the_first_is_a_breakdown(backend):
    """After one iteration r = (0, −1/2, 1/2) and ρ = r̂ᵀr is exactly 0; the x of that iteration is kept."""
    matrix = backend.asarray(np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
    system = System(backend, lambda p: matrix @ p, backend.asarray(np.eye(3)[0]), symmetric=False)
    found = hg.BiCGStab().solve(system)
    assert int(found.failure) == Failure.BREAKDOWN and int(found.products) == 4
    np.testing.assert_allclose(backend.to_numpy(found.x), [1.0, -0.5, 0.0], atol=1e-15)


@each_backend
def test_a_direction_of_no_curvature_that_the_matrix_turns_is_negative_curvature(backend):
    """pᵀAp = 0 and Ap ≠ 0: A is indefinite, however small Ap is beside ‖A‖."""
    matrix = backend.asarray(np.array([[0.0, 0.3, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    system = System(backend, lambda p: matrix @ p, backend.asarray(np.eye(3)[0]), curvature=1.0)
    assert int(hg.CG().solve(system).failure) == Failure.NEGATIVE_CURVATURE
    flat = System(backend, lambda p: 0.0 * p, backend.asarray(np.eye(3)[0]), curvature=1.0)
    assert int(hg.CG().solve(flat).failure) == Failure.SINGULAR


@each_backend
def test_a_dense_solve_in_coarse_arithmetic_stagnates(backend):
    """It knows no residual of its own to miss: what it misses, rounding has done."""
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(30, 30)))[0]
    a = ((q * np.geomspace(1.0, 1e5, 30)) @ q.T).astype("float32")
    matrix, right = (backend.asarray(x.astype("float32"), like=None) for x in (0.5 * (a + a.T), q.sum(1)))
    with pytest.raises(SolveError) as caught:
        hg.solve(lambda p: matrix @ p, right, hg.Direct(rtol=1e-7))
    assert caught.value.reason == "stagnation"


@each_backend
class TestTheTrueResidual:
    def test_within_the_target_is_a_success(self, backend):
        found = solved(backend, Believer(off_by(0.9 * RTOL)))
        assert float(found.residual) == pytest.approx(0.9 * RTOL)

    @pytest.mark.parametrize("factor", [1.2, 5.0, 1e3])
    def test_above_it_is_a_failure_whatever_the_solver_says(self, backend, factor):
        error = reason(backend, Believer(off_by(factor * RTOL)))
        assert error.reason == "stagnation" and error.residual == pytest.approx(factor * RTOL)

    def test_not_a_number_is_a_failure(self, backend):
        assert reason(backend, Believer((np.nan, 0.0, 0.0))).reason == "stagnation"

    @pytest.mark.parametrize(
        "solver", [hg.Neumann(200, rtol=RTOL), Believer((1.0, 0.5, 0.0))], ids=["sum", "x"]
    )
    def test_that_a_maps_to_zero_is_singular(self, backend, solver):
        assert reason(backend, solver, np.diag([1.0, 2.0, 0.0])).reason == "singular"


@each_backend
def test_a_series_may_grow_for_a_while_again_and_again(backend):
    """Terms of sizes 1, 1.5, 2.25, 0.45, 0.675, 1.01, …: twice up and once down, and the sum converges."""
    m = np.array([[0.0, 0.0, 0.2], [1.5, 0.0, 0.0], [0.0, 1.5, 0.0]])
    v = np.array([1.0, 0.0, 0.0])
    found = solved(backend, hg.Neumann(200, step_size=1.0, rtol=1e-10), np.eye(3) - m, v, symmetric=False)
    np.testing.assert_allclose(backend.to_numpy(found.x), np.linalg.solve(np.eye(3) - m, v), rtol=1e-8)


@each_backend
class TestWhereNoStepHelps:
    @pytest.mark.parametrize("solver", [hg.MINRES(1000), hg.GMRES(1000)], ids=repr)
    def test_a_singular_system_is_left_at_once(self, backend, solver):
        for a, v in [
            (np.diag([1.0, 2.0, 0.0]), np.ones(3)),
            (np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 2.0]]), np.array([1.0, 0.0, 1.0])),
        ]:
            error = reason(backend, solver, a, v)
            assert error.reason == "singular" and error.step <= 4

    @pytest.mark.parametrize("solver", [hg.GMRES(1000)], ids=repr)
    def test_one_that_is_not_symmetric(self, backend, solver):
        error = reason(backend, solver, np.array([[0.0, 1.0, 0.0], [0, 0, 1], [0, 0, 0]]), symmetric=False)
        assert error.reason == "singular" and error.step <= 4

    @pytest.mark.parametrize(
        "a, v, step, residual",
        [
            ([[0.0, 1.0], [-1.0, 0.0]], [1.0, 0.0], 1, 1.0),  # v and A v are orthogonal
            ([[1.0, 2.0], [0.0, 1.0]], [2.0, 2.0], 1, 1.0),  # s and A s are
            ([[2.0, 2.0], [1.0, 1.0]], [0.0, 1.0], 2, 0.8**0.5),  # v and r are
        ],
    )
    def test_bicgstab_breaks_down_and_keeps_its_last_iterate(self, backend, a, v, step, residual):
        error = reason(backend, hg.BiCGStab(1000), np.array(a), np.array(v), symmetric=False)
        assert (error.reason, error.step) == ("breakdown", step)
        assert error.residual == pytest.approx(residual)


@each_backend
def test_a_diagonal_that_is_too_small_to_resolve(backend):
    """Entries of the estimate below a thousandth of the largest count as that."""
    found = solved(backend, hg.Diagonal(1), np.diag([1.0, 2.0, 0.0]), np.ones(3))
    np.testing.assert_allclose(backend.to_numpy(found.x), [1.0, 0.5, 500.0])
