"""Where a fault cannot be raised, the hypergradient is NaN, and the report has the reason."""

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.errors import NonFiniteError, SolveError

jax = pytest.importorskip("jax")
jnp = jax.numpy

HARD, INDEFINITE, EASY = jnp.geomspace(1.0, 1e-4, 20), jnp.array([1.0, -2.0, 0.5]), jnp.array([1.0, 2.0, 0.5])


def quadratic(diagonal):
    """C1 = ½ θᵀ D θ − θᵀλ and C2 = ‖θ‖²: at θ = 1 the hypergradient is 2 / D."""
    return hg.Bilevel(lambda w, h, b: 0.5 * jnp.sum(diagonal * w**2) - w @ h, lambda w, h, b: jnp.sum(w**2))


def at_ones(diagonal, estimator):
    ones = jnp.ones(diagonal.size)
    return lambda h: hg.hypergradient(quadratic(diagonal), ones, h, None, None, estimator)


def implicit(solver, **checks):
    return hg.Implicit(solver, checks=hg.Checks(away="ignore", **checks))


FAILED = {
    "out of steps": (HARD, implicit(hg.CG(3))),
    "indefinite": (INDEFINITE, implicit(hg.CG())),
    "diverged": (HARD * 100, implicit(hg.Neumann(50, step_size=1.0))),
    "singular": (jnp.array([1.0, 0.0]), implicit(hg.Direct())),
    "restarted": (HARD, implicit(hg.GMRES(3))),
    "warm": (HARD, implicit(hg.Warm(hg.MINRES(3)))),
}
each_failure = pytest.mark.parametrize(("diagonal", "estimator"), FAILED.values(), ids=FAILED)


@each_failure
class TestFailedSolve:
    def test_is_nan_in_a_program(self, diagonal, estimator):
        assert jnp.isnan(jax.jit(at_ones(diagonal, estimator))(jnp.ones(diagonal.size))).all()

    def test_is_nan_where_mapped(self, diagonal, estimator):
        mapped = jax.vmap(at_ones(diagonal, estimator))
        for program in (mapped, jax.jit(mapped)):
            assert jnp.isnan(program(jnp.ones((2, diagonal.size)))).all()

    def test_is_raised_by_a_check_of_the_report(self, diagonal, estimator):
        problem, ones = quadratic(diagonal), jnp.ones(diagonal.size)
        state = estimator.init(problem, ones, ones)
        out = jax.jit(lambda s, h: estimator.estimate(problem, s, h, None, None))(state, ones)
        assert jnp.isnan(out.hypergradient).all()
        with pytest.raises(SolveError):
            estimator.check(out)

    def test_makes_the_adjoint_nan(self, diagonal, estimator):
        ones, problem = jnp.ones(diagonal.size), quadratic(diagonal)
        x = jax.jit(lambda h: hg.adjoint(problem, ones, h, None, None, estimator.solver))(ones)
        assert jnp.isnan(x).all()


class TestAcceptedSolve:
    @pytest.mark.parametrize(
        "estimator",
        [
            implicit(hg.CG(3, rtol=None)),
            implicit(hg.CG(3), unsolved="ignore"),
            implicit(hg.CG(3), unsolved="warn"),
        ],
        ids=["truncation", "ignored", "warned of"],
    )
    def test_is_a_number(self, estimator):
        ones = jnp.ones(20)
        found = jax.jit(at_ones(HARD, estimator))(ones)
        assert jnp.isfinite(found).all()
        expected = at_ones(HARD, implicit(hg.CG(3), unsolved="ignore"))(ones)
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    def test_that_succeeds_is_exact(self):
        ones = jnp.ones(3)
        for estimator in (implicit(hg.CG()), implicit(hg.Direct()), implicit(hg.MINRES())):
            np.testing.assert_allclose(jax.jit(at_ones(EASY, estimator))(ones), 2 / EASY, rtol=1e-6)

    def test_where_some_fail_the_others_are_numbers(self):
        rows = jnp.stack([EASY, INDEFINITE])
        found = jax.vmap(lambda d: at_ones(d, implicit(hg.CG()))(jnp.ones(3)))(rows)
        np.testing.assert_allclose(found[0], 2 / EASY, rtol=1e-6)
        assert jnp.isnan(found[1]).all()


class TestNonFiniteLoss:
    problem = hg.Bilevel(
        lambda w, h, b: jnp.sum((w * b) ** 2) + h * jnp.sum(w**2), lambda w, h, b: jnp.sum(w**2)
    )

    @pytest.mark.parametrize(
        "estimator", [hg.Greedy(hg.SGD(0.1)), hg.Unrolled(hg.SGD(0.1), 2, tape=hg.States())]
    )
    def test_is_nan_and_named(self, estimator):
        w, h = jnp.ones(2), jnp.array(0.5)
        state = estimator.init(self.problem, w, h)
        program = jax.jit(lambda s, h, b: estimator.estimate(self.problem, s, h, b, None))
        assert jnp.isfinite(program(state, h, jnp.ones(2)).hypergradient)
        out = program(state, h, jnp.array([1.0, jnp.inf]))
        assert jnp.isnan(out.hypergradient)
        with pytest.raises(NonFiniteError, match="T1"):
            estimator.check(out)


class TestSolve:
    """`hg.solve` in a program: x is NaN where it failed, and ``failure`` says why."""

    @staticmethod
    def solved(diagonal, solver):
        v = jnp.ones(diagonal.size)
        return jax.jit(lambda v: hg.solve(lambda p: diagonal * p, v, solver))(v)

    @pytest.mark.parametrize("solver", [hg.CG(3), hg.MINRES(3), hg.GMRES(3), hg.BiCGStab(4)], ids=repr)
    def test_that_fails_is_nan(self, solver):
        out = self.solved(HARD, solver)
        assert jnp.isnan(out.x).all() and int(out.failure) != 0 and float(out.residual) > 1e-6

    @pytest.mark.parametrize("solver", [hg.CG(), hg.CG(2, rtol=None), hg.Neumann(3)], ids=repr)
    def test_that_succeeds_or_promises_nothing_is_a_number(self, solver):
        out = self.solved(EASY, solver)
        assert jnp.isfinite(out.x).all() and int(out.failure) == 0


class TestMappedInPart:
    """Only a loss's value depends on what is mapped over, and the hypergradient does not."""

    problem = hg.Bilevel(
        lambda w, h, b: jnp.sum((w - 1.0) ** 2) + h * jnp.sum(w**2) + b,
        lambda w, h, b: jnp.sum((w - 2.0) ** 2) + jnp.sqrt(b),
    )
    w, h, zero = jnp.ones(3), jnp.asarray(0.3), jnp.asarray(0.0)

    def batches(self, which, b):
        return (b, self.zero) if which == "train" else (self.zero, b)

    @pytest.mark.parametrize("which", ["train", "val"])
    @pytest.mark.parametrize(
        "estimator",
        [
            hg.Greedy(hg.SGD(0.1)),
            hg.Unrolled(hg.SGD(0.1), 3),
            hg.Implicit(hg.CG(), checks=hg.Checks(away="ignore")),
        ],
        ids=["greedy", "unrolled", "implicit"],
    )
    def test_an_estimate(self, estimator, which):
        state = estimator.init(self.problem, self.w, self.h)

        def one(b):
            return estimator.estimate(self.problem, state, self.h, *self.batches(which, b))

        alone, mapped = one(self.zero), jax.vmap(one)(jnp.array([0.0, 1.0, 4.0]))
        np.testing.assert_allclose(mapped.hypergradient, [alone.hypergradient] * 3)
        value = mapped.inner_value if which == "train" else mapped.outer_value
        np.testing.assert_allclose(value - value[0], [0.0, 1.0, 4.0] if which == "train" else [0.0, 1.0, 2.0])

    def test_the_member_whose_loss_is_not_finite_is_withheld(self):
        def one(b):
            return hg.hypergradient(self.problem, self.w, self.h, self.zero, b, hg.Greedy(hg.SGD(0.1)))

        good, bad = jax.vmap(one)(jnp.array([1.0, -1.0]))
        assert jnp.isfinite(good) and jnp.isnan(bad)

    @pytest.mark.parametrize("call", ["step", "tune"])
    @pytest.mark.parametrize("which", ["train", "val"])
    def test_a_tuner(self, call, which):
        tuner = hg.Tuner(self.problem, hg.Greedy(hg.SGD(0.1)), every=1)

        def one(b):
            return getattr(tuner, call)(tuner.init(self.w, self.h), *self.batches(which, b))[1].hparams

        np.testing.assert_allclose(jax.vmap(one)(jnp.array([0.0, 1.0])), [one(self.zero)] * 2)
        if which == "val":  # a fault of one member alone
            stays, moves = jax.vmap(one)(jnp.array([-1.0, 1.0]))
            assert stays == self.h and moves != self.h
