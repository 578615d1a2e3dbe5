"""`Derivatives`: problems given by derivatives written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support.arrays import arrays, numbers
from support.differences import central
from support.frameworks import NUMPY, each_backend
from support.known import Logistic

import hypergrad as hg
from hypergrad.errors import ArgumentError


def by_hand(backend=NUMPY, **wrong):
    """The derivatives of logistic regression with a penalty for each feature, as a user would write them."""
    xp = backend.xp

    def wrongness(b, p):
        return 1 / (1 + xp.exp(b[1] * (b[0] @ p)))

    def hessian_product(p, h, b, q):
        s = wrongness(b, p)
        return b[0].T @ (s * (1 - s) * (b[0] @ q)) + h * q

    given = {
        "outer_grads": lambda p, h, b: (-b[0].T @ (b[1] * wrongness(b, p)), None),
        "hessian_product": hessian_product,
        "mixed_product": lambda p, h, b, q: p * q,
        "inner_grad": lambda p, h, b: -b[0].T @ (b[1] * wrongness(b, p)) + h * p,
        "outer": lambda p, h, b: xp.sum(xp.log1p(xp.exp(-b[1] * (b[0] @ p)))),
    }
    return hg.Derivatives(**(given | wrong))


@each_backend
class TestDerivatives:
    @pytest.mark.parametrize(
        "estimator",
        [
            hg.Implicit(hg.CG(rtol=1e-12), checks=hg.Checks(tolerance=1e9)),
            hg.Implicit(hg.Direct(), checks=hg.Checks(tolerance=1e9)),
            hg.Greedy(hg.SGD(0.01)),
            hg.Greedy(hg.Adam(0.01)),
            hg.Greedy(hg.SGD(0.01, momentum=0.9), response="gradient", lookahead=False),
        ],
        ids=str,
    )
    def test_by_hand_as_by_machine(self, backend, estimator):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam) + 0.1, told.lam)
        results = []
        for problem in (told.problem(backend), by_hand(backend)):
            state = estimator.init(problem, theta, lam, backend=backend)
            results.append(estimator.estimate(problem, state, lam, *told.data(backend), backend=backend))
        made, given = (numbers(backend, out.hypergradient) for out in results)
        np.testing.assert_allclose(given, made, rtol=1e-9, atol=1e-12)
        trained = [numbers(backend, out.state.params) for out in results]
        np.testing.assert_allclose(*trained, rtol=1e-9, atol=1e-12)

    def test_three_functions_are_enough_for_implicit(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        problem = by_hand(backend, inner_grad=None, outer=None)
        estimator = hg.Implicit(hg.CG(rtol=1e-12))
        state = estimator.init(problem, theta, lam, backend=backend)
        out = estimator.estimate(problem, state, lam, *told.data(backend), backend=backend)
        exact = told.hypergradient(told.optimum(told.lam), told.lam)
        np.testing.assert_allclose(numbers(backend, out.hypergradient), exact, rtol=1e-9)
        assert np.isnan(float(out.report.inner_gradient_norm))
        given = problem, theta, lam, *told.data(backend)
        with pytest.raises(ArgumentError, match="inner_grad"):
            hg.hypergradient(*given, hg.Implicit(checks=hg.Checks(away="raise")), backend=backend)
        with pytest.raises(ArgumentError, match="inner_grad"):
            hg.error_bound(*given, hg.Implicit(), backend=backend)

    def test_online_nobody_expects_an_optimum(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam) + 1.0, told.lam)
        given = told.problem(backend), theta, lam, *told.data(backend)
        hg.hypergradient(
            *given, hg.Implicit(hg.CG(), checks=hg.Checks(away="ignore")), backend=backend
        )  # warnings are errors here
        with pytest.raises(ArgumentError, match="away"):
            hg.Checks(away="later")

    def test_training_without_a_gradient_is_refused(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        with pytest.raises(ArgumentError, match="inner_grad"):
            hg.hypergradient(
                by_hand(backend, inner_grad=None), theta, lam, *told.data(backend),
                hg.Greedy(hg.SGD(0.1)), backend=backend,
            )  # fmt: skip

    def test_an_unroll_is_refused(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.lam, told.lam)
        for estimator in (hg.Unrolled(hg.SGD(0.1), steps=2), hg.Forward(hg.SGD(0.1), steps=2)):
            with pytest.raises(ArgumentError, match="Implicit or Greedy"):
                hg.hypergradient(
                    by_hand(backend), theta, lam, *told.data(backend), estimator, backend=backend
                )

    def test_a_wrong_shape_is_named(self, backend):
        told = Logistic()
        theta, lam = arrays(backend, told.optimum(told.lam), told.lam)
        problem = by_hand(backend, mixed_product=lambda p, h, b, q: q[:2])
        with pytest.raises(ArgumentError, match="mixed_product"):
            hg.hypergradient(problem, theta, lam, *told.data(backend), hg.Implicit(), backend=backend)

    def test_a_check_of_right_derivatives(self, backend):
        told = Logistic()
        check = hg.check_derivatives(
            by_hand(backend), *arrays(backend, told.lam, told.lam), *told.data(backend),
            directions=2, backend=backend,
        )  # fmt: skip
        assert max(check.outer_grads, check.hessian_product, check.mixed_product) <= 1e-7
        assert check.symmetry <= 1e-12
        assert check.inner_grad is None

    @pytest.mark.parametrize("size", [1.0, 100.0])
    def test_a_slope_near_zero_is_judged_by_the_size_of_the_gradient(self, backend, size):
        """The derivative along every direction is 0, and given as 1e-4 of the norms."""
        problem = hg.Derivatives(
            outer_grads=lambda p, h, b: (size * 1e-4 * p, None),
            hessian_product=lambda p, h, b, q: q,
            mixed_product=lambda p, h, b, q: 0.0 * h,
            outer=lambda p, h, b: 0.0 * backend.xp.sum(p),
            inner=lambda p, h, b: 0.5 * backend.xp.sum(p * p),
            inner_grad=lambda p, h, b: p,
        )
        at = arrays(backend, np.ones(1), np.ones(1))
        check = hg.check_derivatives(problem, *at, None, None, directions=1, backend=backend)
        # |given| / (‖given‖ ‖p‖ / 1000) in one dimension.
        assert check.outer_grads == pytest.approx(1e3)

    @pytest.mark.parametrize("name", ["outer_grads", "hessian_product", "mixed_product"])
    def test_a_check_finds_the_wrong_one(self, backend, name):
        told = Logistic()
        right = by_hand(backend)
        f = getattr(right, name)

        def off(*args):
            return (1.01 * f(*args)[0], None) if name == "outer_grads" else 1.01 * f(*args)

        check = hg.check_derivatives(
            by_hand(backend, **{name: off}), *arrays(backend, told.lam, told.lam),
            *told.data(backend), directions=1, backend=backend,
        )  # fmt: skip
        for field in ("outer_grads", "hessian_product", "mixed_product"):
            assert (getattr(check, field) > 5e-3) == (field == name)
        assert f"{getattr(check, name):.1e}" in str(check)


class TestSparse:
    def test_a_tuner_over_scipy(self):
        """Sparse logistic regression, which no framework differentiates, tuned online by implicit steps."""
        sparse = pytest.importorskip("scipy.sparse")
        told = Logistic(n=12, count=60)
        x, xv = (sparse.csr_matrix(a * (abs(a) > 0.5)) for a in (told.x, told.xv))
        told.x, told.xv = x.toarray(), xv.toarray()

        def weights(x, y, p):
            return 1 / (1 + np.exp(y * (x @ p)))

        problem = hg.Derivatives(
            lambda p, h, b: (-(b[0].T @ (b[1] * weights(*b, p))), None),
            lambda p, h, b, q: b[0].T @ (weights(*b, p) * (1 - weights(*b, p)) * (b[0] @ q)) + np.exp(h) * q,
            lambda p, h, b, q: np.exp(h) * p * q,
            inner_grad=lambda p, h, b: -(b[0].T @ (b[1] * weights(*b, p))) + np.exp(h) * p,
            outer=lambda p, h, b: np.sum(np.log1p(np.exp(-b[1] * (b[0] @ p)))),
        )
        log_l2 = np.full(12, -4.0)
        theta = told.optimum(np.exp(log_l2))
        found = hg.hypergradient(
            problem, theta, log_l2, (x, told.y), (xv, told.yv), hg.Implicit(hg.CG(rtol=1e-10))
        )
        differences = central(lambda h: told.outer(told.optimum(np.exp(h))), log_l2)
        np.testing.assert_allclose(found, differences, rtol=1e-5, atol=1e-8)

        tuner = hg.Tuner(
            problem, hg.Implicit(hg.Warm(hg.CG()), checks=hg.Checks(tolerance=1e9)), update=hg.SGD(0.02),
            hyper_update=hg.Adam(0.1), every=5,
        )  # fmt: skip
        run = tuner.run(theta, log_l2, (x, told.y), (xv, told.yv), steps=300)
        assert told.outer(told.optimum(np.exp(run.hparams))) < told.outer(theta)
