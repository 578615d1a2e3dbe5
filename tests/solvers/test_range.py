"""Right sides whose squares leave the range of the dtype, singular systems, and what stagnates."""

import numpy as np
import pytest
from support.frameworks import each_backend, on_jax, program

import hypergrad as hg
from hypergrad.errors import SolveError

A = np.array([[2.0, 0.3], [0.3, 1.0]], "float32")
SOLVERS = {
    "cg": hg.CG(),
    "minres": hg.MINRES(),
    "gmres": hg.GMRES(),
    "bicgstab": hg.BiCGStab(),
    "direct": hg.Direct(),
    "preconditioned": hg.CG(preconditioner=hg.Nystrom(1)),
    "warm": hg.Warm(hg.CG()),
}


@each_backend
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("size", [1e-36, 1e-25, 1.0, 1e25, 3e37])
class TestRange:
    def test_the_solution_is_right_at_any_size(self, backend, solver, size):
        v = np.array([1.0, 2.0], "float32") * np.float32(size)
        a, v = backend.asarray(A, like=None), backend.asarray(v, like=None)
        for run in (lambda f: f, lambda f: program(backend, f)):
            x = run(lambda v: hg.solve(lambda p: a @ p, v, solver).x)(v)
            found = backend.to_numpy(x).astype(float) / size
            np.testing.assert_allclose(found, np.linalg.solve(A, [1, 2]), rtol=1e-5)


@each_backend
@pytest.mark.parametrize("size", [2.0**-300, 2.0**-60, 2.0**60, 2.0**300])
@pytest.mark.parametrize("solver", [hg.CG(), hg.MINRES(), hg.GMRES(), hg.BiCGStab(), hg.Direct()], ids=repr)
def test_the_size_of_the_right_side_changes_no_step(backend, solver, size):
    a = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 0.5]])
    matrix, small = backend.asarray(a), backend.asarray(np.array([1.0, 2.0, -1.0]))
    one, other = (hg.solve(lambda p: matrix @ p, s * small, solver) for s in (1.0, size))
    assert int(one.iterations) == int(other.iterations) and int(one.products) == int(other.products)
    np.testing.assert_allclose(backend.to_numpy(other.x) / size, backend.to_numpy(one.x), rtol=1e-13)


@each_backend
@pytest.mark.parametrize("size", [1e-200, 1e-20, 1.0, 1e3, 1e200])
def test_the_absolute_tolerance_is_in_the_units_of_the_right_side(backend, size):
    a, v = np.diag(np.linspace(1.0, 9.0, 9)), np.ones(9)
    matrix, right = backend.asarray(a), backend.asarray(size * v)
    last, one_less, reached = (
        hg.solve(lambda p: matrix @ p, right, solver)
        for solver in (hg.CG(5, rtol=None), hg.CG(4, rtol=None), hg.CG(rtol=None, atol=0.3 * size))
    )
    residual = [np.linalg.norm(a @ (backend.to_numpy(at.x) / size) - v) for at in (last, one_less)]
    assert residual[0] <= 0.3 < residual[1] and int(reached.iterations) == 5


@on_jax
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_derivatives_of_a_solution_are_right_too(backend, size):
    import jax

    a, v = backend.asarray(A, like=None), backend.asarray(np.array([1.0, 2.0], "float32"), like=None)
    slope = jax.grad(lambda v: (size * hg.solve(lambda p: a @ p, v, hg.CG()).x).sum())(v)
    np.testing.assert_allclose(backend.to_numpy(slope) / size, np.linalg.solve(A, [1, 1]), rtol=1e-5)


@each_backend
class TestSingular:
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_direct_finds_the_smallest_solution(self, backend, symmetric):
        a, v = np.diag([2.0, 1.0, 0.0]), np.array([1.0, 3.0, 0.0])
        matrix, right = backend.asarray(a, like=None), backend.asarray(v, like=None)
        found = hg.solve(lambda p: matrix @ p, right, hg.Direct(), symmetric=symmetric)
        np.testing.assert_allclose(backend.to_numpy(found.x), np.linalg.pinv(a) @ v, atol=1e-14)

    def test_and_says_so_where_there_is_none(self, backend):
        matrix = backend.asarray(np.diag([2.0, 1.0, 0.0]), like=None)
        with pytest.raises(SolveError) as caught:
            hg.solve(lambda p: matrix @ p, backend.asarray(np.ones(3), like=None), hg.Direct())
        assert caught.value.reason == "singular"


@each_backend
def test_gmres_keeps_a_direction_for_each_of_fifty_unknowns(backend):
    """A shift, on which restarts make no progress at all."""
    n = 50
    a, v = np.roll(np.eye(n), 1, axis=0), np.eye(n)[0]
    matrix, right = backend.asarray(a, like=None), backend.asarray(v, like=None)
    found = hg.solve(lambda p: matrix @ p, right, hg.GMRES(), symmetric=False)
    np.testing.assert_allclose(a @ backend.to_numpy(found.x), v, atol=1e-10)


@each_backend
@pytest.mark.parametrize("solver", [hg.CG(500, 1e-12), hg.MINRES(500, 1e-12)], ids=repr)
def test_a_residual_that_rounding_keeps_up_is_stagnation(backend, solver):
    """In float32 the true residual stays at 1e-7, and the recurrences go on falling."""
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(30, 30)))[0]
    a = (q * np.geomspace(1.0, 100.0, 30)) @ q.T
    matrix, right = (backend.asarray(x.astype("float32"), like=None) for x in (0.5 * (a + a.T), q.sum(1)))
    with pytest.raises(SolveError, match="rounding keeps the residual") as caught:
        hg.solve(lambda p: matrix @ p, right, solver)
    assert caught.value.reason == "stagnation" and caught.value.residual < 1e-4
