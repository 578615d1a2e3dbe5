"""A bilevel problem as the inner problem of another one."""

from __future__ import annotations

from typing import NamedTuple

from hypergrad.backend import Scalar, Tree, find_backend
from hypergrad.errors import ArgumentError
from hypergrad.problems.base import Problem


class Level(NamedTuple):
    r"""The solution of a bilevel problem, as the parameters of the level above.

    A solution of the lower problem, in θ and λ, is a stationary point of its Lagrangian

        L(θ, λ, x) = C2(θ, λ) − xᵀ ∇_θ C̃1(θ, λ)

        ∂_x L = −∇_θ C̃1 = 0,    ∂_θ L = ∂_θ C2 − H x = 0,    ∂_λ L = dC2/dλ = 0

    so ``Bilevel(inner=lower, outer=C3)`` is a bilevel problem with the inner loss L, whose Hessian is
    symmetric and indefinite: `Implicit` with `MINRES` or `Direct` estimates dC3/dμ. The losses of the lower
    problem take the hyperparameters of both levels as a pair; its T1 and T2 batches are a pair, too::

        lower = hg.Bilevel(c1, c2)              # c1(theta, (lam, mu), train_batch)
        upper = hg.Bilevel(lower, c3)           # c3(level, mu, batch), level.params, level.hparams
        x     = hg.adjoint(lower, theta, (lam, mu), train, val)
        level = hg.Level(theta, lam, x)
        hg.hypergradient(upper, level, mu, (train, val), val3, hg.Implicit(hg.MINRES()))

    Any number of levels can be nested like this.
    """

    params: Tree
    """θ."""
    hparams: Tree
    """λ."""
    adjoint: Tree
    """x, with H x = ∂_θ C2: see `hypergrad.adjoint`."""


def lagrangian(problem: Problem, level: Level, mu: Tree, batches: tuple[Tree, Tree]) -> Scalar:
    """Return C2 − xᵀ ∇_θ C̃1, whose stationary points are the solutions of a bilevel problem.

    Raises:
        ArgumentError: if the parameters are not a `Level`, or the batches not a pair.
    """
    if not isinstance(level, Level):
        raise ArgumentError(
            f"the parameters of an upper level must be hg.Level(params, hparams, adjoint), not a "
            f"{type(level).__name__}"
        )
    if not (isinstance(batches, tuple) and len(batches) == 2):
        raise ArgumentError("a batch of an upper level must be a pair (T1 batch, T2 batch) of the lower one")
    backend = find_backend(level)
    theta, lam, x = level
    train, val = batches
    _, g, _ = problem.inner_gradient(backend, theta, (lam, mu), train, None)
    c2 = problem.validation_loss(theta, (lam, mu), val, None)
    return c2 - backend.inner(x, g)
