"""Differences of functions of one number: slopes, kinks, and functions that are nowhere finite."""

import numpy as np
import pytest

from hypergrad.checks import Check
from hypergrad.checks.ridders import jump, ridders
from hypergrad.errors import NonFiniteError


@pytest.mark.parametrize(
    "f, slope",
    [(np.sin, 1.0), (np.exp, 1.0), (lambda h: 1 / (1 + h), -1.0), (lambda h: np.log(1e-3 + h), 1e3)],
)
def test_the_estimated_error_bounds_the_true_one(f, slope):
    found, error = ridders(f, 0.1)
    assert abs(found - slope) <= max(10 * error, 1e-9 * abs(slope)) and error < 1e-6 * abs(slope)


def test_a_jump_is_no_slope():
    assert ridders(lambda h: abs(h - 1e-3), 0.1)[1] < 1e-6
    assert ridders(lambda h: np.sign(h) + h, 0.1)[1] > 0.1


@pytest.mark.parametrize("kink", [-3.0, 0.25, 2.0])
def test_the_size_of_a_kink(kink):
    assert jump(lambda h: np.sin(h) + kink * abs(h) / 2, 0.1, 0.0) == pytest.approx(kink, rel=1e-3)


@pytest.mark.parametrize("f", [np.sin, np.exp, lambda h: h**2, lambda h: abs(h) ** 3])
def test_a_smooth_function_has_none(f):
    assert jump(f, 0.1, f(0.0)) == 0.0


def test_a_kink_below_the_noise_is_none():
    assert jump(lambda h: 1e-3 * abs(h), 0.1, 0.0, noise=1e-6) == 0.0


def test_a_function_that_is_nowhere_finite():
    with pytest.raises(NonFiniteError) as caught:
        ridders(lambda h: float("nan"), 0.1)
    assert (caught.value.where, caught.value.step) == ("T2", 0)


@pytest.mark.parametrize(("off", "agrees"), [(1e-9, True), (1e-8, True), (1e-7, False)])
def test_differences_without_error_are_believed_to_the_root_of_a_rounding(off, agrees):
    exact = np.array([1.0])
    found = Check("mine", "real training", np.array([1.0 + off]), exact, 0 * exact, exact, own=exact)
    assert found.verdict.startswith("agrees to ") is agrees
