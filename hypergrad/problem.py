"""What parameters are the solution of, and what judges them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from hypergrad.arguments import check_same
from hypergrad.backend import Backend, Scalar, Tree, find_backend
from hypergrad.errors import ArgumentError
from hypergrad.finite import first_nonfinite
from hypergrad.losses import evaluate

Loss = Callable[..., Any]


class Validation(NamedTuple):
    """C2 and its derivatives at one point: the value, v = ∂_θ C2, ∂_λ C2, and which λ it reaches.

    ``bad_leaf`` is the first leaf of v that is not finite, −1 if there is none.
    """

    value: Scalar
    v: Tree
    direct: Tree
    reached: Tree
    bad_leaf: Any


class Problem(ABC):
    r"""Minimise C2(θ, λ) over the hyperparameters λ, where the parameters θ solve G(θ, λ) = 0.

    G is ∇_θ C̃1 where a loss C̃1 is trained on, and whatever a step of training moves against elsewhere.
    Estimators see no more of a problem than this: G, C2, and their derivatives.
    """

    symmetric: ClassVar[bool] = True
    """Is ∂_θ G, as a Hessian is?"""
    definite: bool = True
    """Is ∂_θ G positive definite at a solution, as the Hessian is at a minimum?"""
    by_hand: ClassVar[bool] = False
    """Are its derivatives given, so that no framework takes them?"""
    has_aux: bool = False

    @abstractmethod
    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        """C̃1, G as a differentiable function of θ and λ, and the next auxiliary state."""

    @abstractmethod
    def reached(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        """Which hyperparameters are used in training at all, at the price of one evaluation."""

    @abstractmethod
    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        """C2."""

    def validation(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Validation:
        """C2 and both of its gradients: one backward pass."""

        def loss(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
            return self.validation_loss(params, hparams, batch, backend.copy(aux)), ()

        value, pullback, _ = evaluate(backend, "outer", loss, batch, params, hparams)
        v, direct = pullback(backend.xp.ones_like(value))
        bad_leaf = first_nonfinite(backend, backend.detach(v))
        return Validation(value, v, direct, pullback.reached[1], bad_leaf)


@final
@dataclass(frozen=True)
class Bilevel(Problem):
    r"""Minimise C2(θ, λ) over the hyperparameters λ, where training on C̃1(θ, λ) made the parameters θ.

        C̃1 = C1 + Ω   on the training set T1       (Luketina et al. 2016, eq. 1)
        C2            on the validation set T2

    Both losses are called as ``loss(params, hparams, batch)`` and return a scalar. Parameters,
    hyperparameters and batches are any trees of the framework's own arrays; they reach the losses as
    they are, never wrapped and never copied. A loss of the NumPy backend is written with
    ``autograd.numpy``.

    One array at two places of a tree makes two parameters, as everywhere in functional code. To tie
    parameters, keep one leaf and use it twice inside the loss.

    What a model updates while it trains, and nobody differentiates by, is its auxiliary state: running
    statistics of a BatchNorm, a key or a counter for its noise. With ``has_aux`` it goes through the losses,
    and through training from step to step, as a constant of every derivative: how noise in training moves the
    running averages by which T2 is normalised, for instance, no hypergradient sees::

        inner(params, hparams, batch, aux) -> (scalar, aux)
        outer(params, hparams, batch, aux) -> scalar
        state = estimator.init(problem, params, hparams, aux=aux)

    A problem with more levels is a bilevel problem whose ``inner`` is one, see `Level`.

    Args:
        inner: the regularised training loss C̃1, or the `Bilevel` problem of the level below.
        outer: the validation loss C2.
        has_aux: do the losses take an auxiliary state, and does the inner one return the next?

    Raises:
        ArgumentError: if either is not callable, or the level below has an auxiliary state.
    """

    inner: Loss | Bilevel
    outer: Loss
    has_aux: bool = False

    def __post_init__(self) -> None:
        for name in ("inner", "outer"):
            part = getattr(self, name)
            if not (callable(part) or (name == "inner" and isinstance(part, Bilevel))):
                raise ArgumentError(f"Bilevel: {name} must be a function (params, hparams, batch) -> scalar")
        if isinstance(self.inner, Bilevel) and (self.has_aux or self.inner.has_aux):
            raise ArgumentError("Bilevel: an auxiliary state goes through two levels, and not through three")

    @property
    def definite(self) -> bool:  # type: ignore[override]
        """A Lagrangian has a saddle at its solution."""
        return not isinstance(self.inner, Bilevel)

    def training_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> tuple[Scalar, Tree]:
        """C̃1 and the next auxiliary state.

        Raises:
            ArgumentError: if ``inner`` should return two things, and does not.
        """
        if isinstance(self.inner, Bilevel):
            return lagrangian(self.inner, params, hparams, batch), aux
        if not self.has_aux:
            return self.inner(params, hparams, batch), aux
        result = self.inner(params, hparams, batch, aux)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ArgumentError(
                f"inner returned {type(result).__name__}: with has_aux=True it returns (loss, aux), the "
                "loss and the next auxiliary state"
            )
        return result

    def loss_on(
        self, backend: Backend, batch: Tree, aux: Tree
    ) -> Callable[[Tree, Tree], tuple[Scalar, Tree]]:
        """C̃1 on a batch, with the auxiliary state filled in: (θ, λ) -> (C̃1, next auxiliary state).

        The loss gets a copy of the state: some write to theirs, as torch's BatchNorm does.

        Raises:
            ArgumentError, LeafTypeError: when called, if the next state is of another kind than this one.
        """

        def loss(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
            value, after = self.training_loss(params, hparams, batch, backend.copy(aux))
            if self.has_aux:
                check_same(backend, "inner", after, "aux", aux)
            return value, after

        return loss

    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        loss = self.loss_on(backend, batch, aux)
        value, pullback, aux = evaluate(backend, "inner", lambda p: loss(p, hparams), batch, params)
        (gradient,) = pullback(backend.xp.ones_like(value))
        return value, gradient, aux

    def reached(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        loss = self.loss_on(backend, batch, aux)
        _, pullback, _ = evaluate(backend, "inner", loss, batch, params, hparams)
        return pullback.reached[1]

    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        return self.outer(params, hparams, batch, *([aux] if self.has_aux else []))


class Level(NamedTuple):
    r"""A bilevel problem where it is solved, as the parameters of the level above.

    A solution of the lower problem, in θ and λ, is a stationary point of its Lagrangian

        L(θ, λ, x) = C2(θ, λ) − xᵀ ∇_θ C̃1(θ, λ)

        ∂_x L = −∇_θ C̃1 = 0,    ∂_θ L = ∂_θ C2 − H x = 0,    ∂_λ L = dC2/dλ = 0

    so that ``Bilevel(inner=lower, outer=C3)`` is a bilevel problem of which L is the inner loss, with a
    Hessian that is symmetric and indefinite: `Implicit` with `MINRES` or `Direct` estimates dC3/dμ. The
    losses of the lower problem are given the hyperparameters of both levels, and its batches in a pair::

        lower = hg.Bilevel(c1, c2)              # c1(theta, (lam, mu), train_batch)
        upper = hg.Bilevel(lower, c3)           # c3(level, mu, batch), level.params, level.hparams
        x     = hg.adjoint(lower, theta, (lam, mu), train, val)
        level = hg.Level(theta, lam, x)
        hg.hypergradient(upper, level, mu, (train, val), val3, hg.Implicit(hg.MINRES()))

    Any number of levels nest like this.
    """

    params: Tree
    """θ."""
    hparams: Tree
    """λ."""
    adjoint: Tree
    """x, with H x = ∂_θ C2: see `hypergrad.adjoint`."""


def lagrangian(problem: Problem, level: Level, above: Tree, batches: tuple[Tree, Tree]) -> Scalar:
    """C2 − xᵀ ∇_θ C̃1, whose stationary points are the solutions of a bilevel problem.

    Raises:
        ArgumentError: for parameters that are no `Level`, or batches that are no pair.
    """
    if not isinstance(level, Level):
        raise ArgumentError(
            f"the parameters of a level above another are hg.Level(params, hparams, adjoint), not a "
            f"{type(level).__name__}"
        )
    if not (isinstance(batches, tuple) and len(batches) == 2):
        raise ArgumentError("a batch of a level above another is a pair: (its T1 batch, its T2 batch)")
    backend = find_backend(level)
    theta, lam, x = level
    train, val = batches
    _, g, _ = problem.inner_gradient(backend, theta, (lam, above), train, ())
    c2 = problem.validation_loss(theta, (lam, above), val, ())
    return c2 - backend.inner(x, g)
