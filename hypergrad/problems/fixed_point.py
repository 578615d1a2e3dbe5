"""Problems whose parameters are the fixed point of a map, not the optimum of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from hypergrad.backend import Backend, Scalar, Tree, find_backend, vectors
from hypergrad.backend.arguments import check_batch, check_same
from hypergrad.errors import ArgumentError
from hypergrad.problems.base import Loss, Problem
from hypergrad.problems.bilevel import Bilevel
from hypergrad.updates import UpdateRule, Updates, as_update_rule


@final
@dataclass(frozen=True)
class FixedPoint(Problem):
    r"""Minimise C2(θ, λ) over λ, where θ = φ(θ, λ): an equilibrium layer, a solver's iteration, a game.

        G(θ, λ) = θ − φ(θ, λ),    dC2/dλ = ∂_λ C2 + (∂_λ φ)ᵀ x,    (I − ∂_θ φ)ᵀ x = ∂_θ C2

    Every estimator accepts it and treats G as a gradient: a step of ``SGD(1.0)`` is one iteration
    θ ← φ(θ, λ), so ``Unrolled(SGD(1.0), steps=T)`` differentiates T of them, `Greedy` the last one (the
    "Jacobian-free" derivative of Fung et al. 2022), and `Implicit` the limit (Bai, Kolter and Koltun 2019).
    The system is not symmetric: use `GMRES`, `BiCGStab`, `Neumann` or `Direct`. Where φ is a step of an
    optimiser on a loss, `of_update` builds the problem.

    Estimates and histories report ‖G‖ as the inner value.

    Args:
        step: the map φ: (params, hparams, batch) -> params; with ``has_aux`` (params, hparams, batch, aux) ->
            (params, aux).
        outer: C2: (params, hparams, batch) -> scalar; with ``has_aux`` it takes the auxiliary state, too.
        has_aux: is there an auxiliary state? See `Bilevel`.

    Raises:
        ArgumentError: if ``step`` or ``outer`` is not callable; when used, if φ returns another structure or
            shape.
        LeafTypeError: when used, if φ returns another dtype.
    """

    symmetric: ClassVar[bool] = False

    step: Loss
    outer: Loss
    has_aux: bool = False

    def __post_init__(self) -> None:
        for name in ("step", "outer"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"FixedPoint: {name} must be a function of (params, hparams, batch)")

    @classmethod
    def of_update(cls, problem: Bilevel, rule: Updates) -> FixedPoint:
        r"""Return the fixed-point problem of training by an update rule that is not a gradient step:

            θ = Φ(θ, λ),    such as θ = prox_λ(θ − η ∇_θ C̃1(θ, λ))

        For penalties without a gradient, whose minimum is the fixed point of `Proximal` steps (Bertrand et
        al. 2020)::

            lasso = hg.FixedPoint.of_update(problem, hg.Proximal(hg.SGD(eta), prox))
            hg.hypergradient(lasso, params, hparams, train, val, hg.Implicit(hg.GMRES()))

        Args:
            problem: C̃1 and C2.
            rule: an update rule without a state of its own. A rule with momentum has the same fixed points as
                one without.

        Raises:
            ArgumentError: if ``rule`` is not an update rule, or the problem has no training loss; when used,
                if the rule has a state.
        """
        if not isinstance(problem, Bilevel):
            raise ArgumentError(
                f"FixedPoint.of_update needs a training loss that a framework differentiates, and "
                f"{type(problem).__name__} has none: pass an hg.Bilevel problem"
            )
        return cls(UpdateMap(problem, as_update_rule(rule)), problem.outer, problem.has_aux)

    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        check_batch(backend, "train", batch, params)
        after, aux = self._step(backend, params, hparams, batch, aux)
        check_same(backend, "FixedPoint: step", after, "params", params)
        g = vectors.subtract(backend, params, after)
        return vectors.norm(backend, backend.detach(g)), g, aux

    def uses(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        return backend.uses(lambda p, h: self._step(backend, p, h, batch, aux), params, hparams)[1]

    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        return self.outer(params, hparams, batch, *([aux] if self.has_aux else []))

    def _step(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Tree, Tree]:
        own_aux = (backend.copy(aux),) if self.has_aux else ()
        with backend.as_called():
            result = self.step(params, hparams, batch, *own_aux)
        if not self.has_aux:
            return result, aux
        after, next_aux = result
        check_same(backend, "FixedPoint: step", next_aux, "aux", aux)
        return after, next_aux


@final
@dataclass(frozen=True)
class UpdateMap:
    """θ ↦ Φ(θ, λ): one step of training, as the map of a `FixedPoint`."""

    problem: Bilevel
    rule: UpdateRule

    def __call__(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree = None) -> Any:
        backend = find_backend(params, hparams)
        state = self.rule.init(backend, params)
        if backend.flatten(state)[0]:
            raise ArgumentError(
                f"FixedPoint.of_update: {self.rule!r} has a state, which is not a part of the fixed "
                "point: pass the rule without momentum, which has the same fixed points"
            )
        self.rule.check_connected(backend, state, params, hparams, 0)
        _, g, aux = self.problem.inner_gradient(backend, params, hparams, batch, aux)
        after, _ = self.rule.checked(backend, g, state, params, hparams, 0)
        return (after, aux) if self.problem.has_aux else after
