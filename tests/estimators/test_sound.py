"""What `sound` answers: whether `check` would raise, as a value."""

import pytest
from support.arrays import arrays
from support.frameworks import each_backend
from support.known import Logistic

import hypergrad as hg
from hypergrad.errors import Failure, InnerNotConvergedError, SolveError

TOLERANCE = 1e-3
BROKEN = {
    "away": (lambda r: r._replace(inner_gradient_norm=2 * TOLERANCE + 0.0 * r.inner_gradient_norm), "away"),
    "far away": (lambda r: r._replace(inner_gradient_norm=1e3 + 0.0 * r.inner_gradient_norm), "away"),
    "unsolved": (lambda r: r._replace(solve=r.solve._replace(failure=int(Failure.MAX_STEPS))), "unsolved"),
}


def estimated(backend, **checks):
    told = Logistic()
    estimator = hg.Implicit(hg.CG(rtol=1e-8), checks=hg.Checks(tolerance=TOLERANCE, **checks))
    theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
    state = estimator.init(told.problem(backend), theta, lam, backend=backend)
    return estimator, estimator.estimate(
        told.problem(backend), state, lam, *told.data(backend), backend=backend
    )


@each_backend
class TestSound:
    def test_a_solve_at_a_solution_is(self, backend):
        estimator, out = estimated(backend, away="raise", unsolved="raise")
        assert bool(estimator.sound(out)) and estimator.check(out) is not None

    @pytest.mark.parametrize("name", BROKEN)
    def test_what_check_raises_is_not(self, backend, name):
        spoil, kind = BROKEN[name]
        estimator, out = estimated(backend, away="raise", unsolved="raise")
        broken = out._replace(report=spoil(out.report))
        assert not bool(estimator.sound(broken))
        with pytest.raises({"away": InnerNotConvergedError, "unsolved": SolveError}[kind]):
            estimator.check(broken)

    @pytest.mark.parametrize("name", BROKEN)
    def test_what_check_lets_through_is(self, backend, name):
        spoil, kind = BROKEN[name]
        estimator, out = estimated(backend, **({"away": "raise", "unsolved": "raise"} | {kind: "ignore"}))
        broken = out._replace(report=spoil(out.report))
        assert bool(estimator.sound(broken)) and estimator.check(broken) is not None

    def test_a_number_that_is_none_is_not(self, backend):
        estimator, out = estimated(backend)
        nan = backend.map(lambda x: float("nan") * x, out.hypergradient)
        assert not bool(estimator.sound(out._replace(hypergradient=nan)))
