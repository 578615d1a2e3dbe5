"""Domains of hyperparameters: an update of size zero moves nothing, and no update leaves the domain."""

import numpy as np
import pytest
from support.frameworks import each_backend

import hypergrad as hg

SPACES = {
    "exp": (hg.Positive(), [1e-30, 1e-8, 1.0, 1e30]),
    "softplus": (hg.Positive("softplus"), [1e-30, 1e-8, 1.0, 1e3, 1e30]),
    "from-0": (hg.Interval(0, 1), [1e-30, 1e-8, 0.5, 1 - 1e-6]),
    "from-1": (hg.Interval(1, 2), [1 + 2e-7, 1.5, 2 - 2e-7]),
    "over-0": (hg.Interval(-1, 1), [-1 + 1e-7, 0.0, 1 - 1e-7]),
    "below-0": (hg.Interval(-3.7, -1), [-3.69, -1.0000002]),
}


def slope(backend, space, u):
    """dλ/du by autodiff."""
    at = backend.asarray(np.array(u), like=None)
    _, pullback = backend.pullback(lambda u: space.constrain(backend.xp, u), at)
    (gradient,) = pullback(backend.xp.ones_like(at))
    return float(backend.to_numpy(gradient))


@each_backend
@pytest.mark.parametrize("space, values", SPACES.values(), ids=SPACES)
class TestDomains:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_an_update_of_size_zero_moves_nothing(self, backend, space, values, dtype):
        h = backend.asarray(np.array(values, dtype), like=None)
        u = space.unconstrain(backend.xp, h)
        there = space.constrain(backend.xp, space.project(backend.xp, u))
        largest = 70 * np.finfo(dtype).eps  # |u| ≤ 70, and rounding u changes λ by |u| of its last bits
        np.testing.assert_allclose(backend.to_numpy(there), np.array(values, dtype), rtol=largest)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_no_update_leaves_the_domain(self, backend, space, values, dtype):
        far = np.array([-3e38, -1e4, -200, 200, 1e4, 3e38], dtype)
        u = space.project(backend.xp, backend.asarray(far, like=None))
        inside = space.contains(backend.xp, space.constrain(backend.xp, u))
        assert backend.to_numpy(inside).all()

    @pytest.mark.parametrize("u", [-30.0, -2.0, 0.0, 3.0, 30.0])
    def test_the_slope_is_that_of_the_formula(self, backend, space, values, u):
        link = getattr(space, "link", "logistic")
        logistic = 1 / (1 + np.exp(-u))
        width = getattr(space, "high", 1) - getattr(space, "low", 0)
        expected = {"exp": np.exp(u), "softplus": logistic, "logistic": width * logistic / (1 + np.exp(u))}
        assert slope(backend, space, u) == pytest.approx(expected[link], rel=1e-12)
