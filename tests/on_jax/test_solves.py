"""Solves that fail, and many starts at once, each with a status of its own."""

import warnings
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose
from support.jax_faults import GIVEN, QUADRATIC, RIDGE, caught, judged, quadratic_args, ridge, same_error
from support.reality import EACH, RULE, asarrays, compiled, eager, program

import hypergrad as hg
from hypergrad import errors

jax = pytest.importorskip("jax")
jnp, tree = jax.numpy, jax.tree_util
parametrize = pytest.mark.parametrize
WIDE = np.diag([1.0, 2.0, 5.0, 9.0])
SOLVES = {
    "cg-negative_curvature": (hg.CG(), np.diag([2.0, -1.0]), "negative_curvature"),
    "cg-singular": (hg.CG(), np.diag([1.0, 0.0]), "singular"),
    "cg-max_steps": (hg.CG(max_steps=2), WIDE, "max_steps"),
    "direct-singular": (hg.Direct(), np.diag([1.0, 0.0]), "singular"),
    "neumann-diverged": (hg.Neumann(100, 1.0), np.diag([1.0, 10.0]), "diverged"),
    "neumann-negative_curvature": (hg.Neumann(100, 0.1, 1e-6), np.diag([2.0, -1.0]), "negative_curvature"),
}


def warned(call, *args):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(*args)
    return [(w.category, str(w.message)) for w in found]


class TestSolves:
    @parametrize("solver, hessian, reason", SOLVES.values(), ids=SOLVES)
    def test_what_failed_is_carried_and_raised(self, solver, hessian, reason):
        strict, args = hg.Implicit(solver), quadratic_args(hessian)
        error = caught(eager(strict, QUADRATIC), *args)
        out = compiled(strict, QUADRATIC)(*args)
        found = caught(strict.check, out)
        same_error(found, error)
        assert (type(found), found.reason) == (errors.SolveError, reason) and found.residual > 1e-6
        lenient = hg.Implicit(solver, checks=hg.Checks(unsolved="warn"))
        (category, message), *_ = warned(lenient.check, compiled(lenient, QUADRATIC)(*args))
        assert category is errors.SolveWarning and message == str(found)

    def test_away_from_the_optimum(self):
        args = quadratic_args(np.diag([1.0, 2.0]), slope=0.3)
        lenient, strict = hg.Implicit(hg.CG()), hg.Implicit(hg.CG(), checks=hg.Checks(away="raise"))
        out = compiled(lenient, QUADRATIC)(*args)
        expected = warned(eager(lenient, QUADRATIC), *args)
        assert expected == warned(lenient.check, out)
        assert [category for category, _ in expected] == [errors.InnerNotConvergedWarning]
        same_error(caught(strict.check, out), caught(eager(strict, QUADRATIC), *args))

    def test_differences_that_disagree(self):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, h, b) + jnp.sum(jnp.abs(p["w"]) * h["x"]), judged)
        estimator = hg.Greedy(RULE, products=hg.FiniteDifference(radius=0.3))
        params, hparams, (train, *_), val = asarrays(
            *(GIVEN | {"params": {"w": np.array([0.1, -0.7])}}).values()
        )
        error = caught(eager(estimator, problem), params, hparams, train, val)
        assert type(error) is errors.DifferenceError
        same_error(caught(estimator.check, compiled(estimator, problem)(params, hparams, train, val)), error)


class TestManyStarts:
    """Under vmap each start has a status of its own."""

    @staticmethod
    def statuses(estimator, problem, params, starts, train, val):
        """The report on all starts, and what comes of each, the same from one program for all and for one."""

        def outcome(out):
            try:
                return estimator.check(out)
            except errors.HypergradError as error:
                return error

        run, alone = eager(estimator, problem), compiled(estimator, problem)
        out = program(jax.vmap(lambda h: run(params, h, lambda t: train, val)))(starts)
        found = []
        for k in range(len(tree.tree_leaves(starts)[0])):
            pick = partial(tree.tree_map, lambda x, k=k: x[k])
            mine, other = outcome(pick(out)), outcome(alone(params, pick(starts), train, val))
            if isinstance(other, errors.HypergradError):
                same_error(mine, other)
            else:
                for leaf, expected in other.hypergradient.items():
                    assert_allclose(mine.hypergradient[leaf], expected, rtol=1e-9, atol=1e-12)
            found.append(mine)
        return out.report, found

    @parametrize("name", ["greedy", "states"])
    def test_a_loss_that_is_not_finite(self, name):
        params, hparams, (train, *_), val = asarrays(*GIVEN.values())
        starts = {"x": jnp.stack([hparams["x"], hparams["x"] * jnp.inf, 2 * hparams["x"]])}
        report, (first, bad, last) = self.statuses(EACH[name], RIDGE, params, starts, train, val)
        assert report.faults.step.tolist() == [-1, 0, -1]
        assert isinstance(first, hg.Estimate) and isinstance(last, hg.Estimate)
        assert (type(bad), bad.where, bad.step) == (errors.NonFiniteError, "T1", 0)

    @parametrize("solver", [hg.CG(), hg.Direct()], ids=repr)
    def test_a_solve_that_failed(self, solver):
        diagonals = np.array([[1.0, 2.0], [1.0, 0.0], [2.0, -1.0], [3.0, 3.0]])
        params, _, train, val = quadratic_args(np.eye(2))
        starts = {"x": jnp.zeros(4), "hessian": jnp.asarray([np.diag(d) for d in diagonals])}
        report, found = self.statuses(hg.Implicit(solver), QUADRATIC, params, starts, train, val)
        assert report.solve.failure.tolist() == [0, 1, 2, 0]
        assert [getattr(x, "reason", None) for x in found] == [None, "singular", "negative_curvature", None]
        assert report.solve.iterations.shape == report.solve.residual.shape == (4,)
