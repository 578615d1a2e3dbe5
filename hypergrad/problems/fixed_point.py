"""Parameters that are the fixed point of a map, and the optimum of nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import check_batch, check_same
from hypergrad.errors import ArgumentError
from hypergrad.problems.base import Loss, Problem


@final
@dataclass(frozen=True)
class FixedPoint(Problem):
    r"""Minimise C2(θ, λ) over λ, where θ = φ(θ, λ): an equilibrium layer, a solver's iteration, a game.

        G(θ, λ) = θ − φ(θ, λ),    dC2/dλ = ∂_λ C2 + (∂_λ φ)ᵀ x,    (I − ∂_θ φ)ᵀ x = ∂_θ C2

    Every estimator takes it, as if G were a gradient: a step of ``SGD(1.0)`` is one iteration θ ← φ(θ, λ), so
    ``Unrolled(SGD(1.0), steps=T)`` differentiates T of them, `Greedy` the last one (the "Jacobian-free"
    derivative of Fung et al. 2022), and `Implicit` the limit (Bai, Kolter and Koltun 2019). The system is not
    symmetric: take `GMRES`, `BiCGStab`, `Neumann` or `Direct`. Where φ is a step of an optimiser on a loss,
    the problem is a `Bilevel` one, and ``Implicit(update=…)`` says so.

    What stands for the inner value in estimates and histories is ‖G‖.

    Args:
        step: the map φ: (params, hparams, batch) -> params.
        outer: C2: (params, hparams, batch) -> scalar.

    Raises:
        ArgumentError: if either is not callable; when used, if φ returns another structure or shape.
        LeafTypeError: when used, if φ returns another dtype.
    """

    symmetric: ClassVar[bool] = False

    step: Callable[[Tree, Tree, Tree], Tree]
    outer: Loss

    def __post_init__(self) -> None:
        for name in ("step", "outer"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"FixedPoint: {name} must be a function of (params, hparams, batch)")

    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        check_batch(backend, "train", batch, params)
        after = self.step(params, hparams, batch)
        check_same(backend, "FixedPoint: step", after, "params", params)
        g = vectors.subtract(backend, params, after)
        return vectors.norm(backend, backend.detach(g)), g, aux

    def reached(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        _, pullback = backend.pullback(lambda p, h: self.step(p, h, batch), params, hparams)
        return pullback.reached[1]

    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        return self.outer(params, hparams, batch)
