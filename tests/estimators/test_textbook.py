"""The textbook's formulas agree with each other, with closed forms and with differences."""

import autograd.numpy as np
import pytest
from hypergrad_numpy import textbook as tb
from numpy.testing import assert_allclose

RNG = np.random.default_rng(0)
N, M = 4, 3
X, Y, XV, YV = RNG.normal(size=(9, N)), RNG.normal(size=9), RNG.normal(size=(9, N)), RNG.normal(size=9)
S = RNG.normal(size=(N, M)) / 3
THETA, LAM = RNG.normal(size=N), RNG.normal(size=M)
ridge = tb.regularised_cost(
    lambda theta, lam, batch: 0.5 * np.sum((X @ theta - Y) ** 2),
    lambda theta, lam: 0.5 * np.sum(np.exp(S @ lam) * theta**2),
)
outer = lambda theta, lam, batch: np.sum(np.tanh(XV @ theta - YV) ** 2) + np.sum(lam**2)  # noqa: E731


def close(mine, other, rtol=1e-10):
    assert_allclose(mine, other, rtol=rtol, atol=rtol)


def solution(lam):
    return np.linalg.solve(X.T @ X + np.diag(np.exp(S @ lam)), X.T @ Y)


def test_greedy_is_one_step_of_unrolled():
    phi = tb.sgd_map(ridge, N, 0.01)
    close(
        tb.greedy(ridge, outer, THETA, LAM, None, None, 0.01),
        tb.unrolled(phi, outer, THETA, LAM, [None], None, N),
    )


@pytest.mark.parametrize(
    "phi, size",
    [
        (tb.sgd_map(ridge, N, lambda lam: 0.01 * np.exp(lam[0]), 0.5, True, 0.1), 2 * N),
        (tb.adam_map(ridge, N, 0.05, decoupled=True, weight_decay=0.1), 3 * N),
        (tb.rmsprop_map(ridge, N, 0.05, momentum=0.5), 3 * N),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_backward_is_forward_is_differences(phi, size):
    z, batches = np.concatenate([THETA, np.zeros(size - N)]), [None] * 5
    backward = tb.unrolled(phi, outer, z, LAM, batches, None, N)
    close(backward, tb.forward(phi, outer, z, LAM, batches, None, N))
    end = lambda lam: outer(tb.trajectory(phi, z, lam, batches)[-1][:N], lam, None)  # noqa: E731
    close(backward, tb.finite_difference(end, LAM, 1e-5), 1e-6)


def test_implicit_is_the_derivative_of_the_solution():
    close(
        tb.implicit(ridge, outer, solution(LAM), LAM, None, None),
        tb.finite_difference(lambda lam: outer(solution(lam), lam, None), LAM, 1e-5),
        1e-7,
    )


def test_reversing_the_dynamics_is_unrolling_them():
    etas, gammas = np.full(6, 0.02), np.full(6, 0.8)
    reversed_ = tb.maclaurin(ridge, outer, THETA, np.zeros(N), LAM, [None] * 6, None, etas, gammas)
    momentum = tb.sgd_map(ridge, N, 0.02 * 0.2, 0.8)
    z = np.concatenate([THETA, np.zeros(N)])
    close(reversed_.lam, tb.unrolled(momentum, outer, z, LAM, [None] * 6, None, N))


def test_equation_seven_leaves_out_the_curvature():
    batches, eta = [None] * 4, 0.01
    steps = tb.trajectory(tb.sgd_map(ridge, N, eta), THETA, LAM, batches)
    v = tb.nabla_theta(outer, steps[-1], LAM, None)
    kept = sum(tb.mixed(ridge, theta, LAM, None).T @ v for theta in steps[:-1])
    close(
        tb.unrolled_sgd_ignoring_curvature(ridge, outer, THETA, LAM, batches, None, eta),
        tb.nabla_lam(outer, steps[-1], LAM, None) - eta * kept,
    )


def test_equation_three_to_the_letter():
    literal = tb.greedy_literal(ridge, outer, THETA, LAM, None, None)
    direct = tb.nabla_lam(outer, THETA, LAM, None)
    scaled = tb.greedy(ridge, outer, THETA, LAM, None, None, 0.01, lookahead=False)
    close(0.01 * (literal - direct), scaled - direct)
    with pytest.raises(ValueError, match="eta"):
        tb.greedy_literal(ridge, outer, THETA, LAM, None, None, lookahead=True)


def test_conjugate_gradients_end_at_the_solution():
    H, v = tb.hessian(ridge, THETA, LAM, None), RNG.normal(size=N)
    close(tb.conjugate_gradients(H, v, N)[-1], np.linalg.solve(H, v))
    close(
        tb.neumann(ridge, outer, THETA, LAM, None, None, 0.02, 3000),
        tb.implicit(ridge, outer, THETA, LAM, None, None),
    )


def test_the_demonstration_prints_its_table(capsys):
    tb.main()
    assert "central differences" in capsys.readouterr().out
