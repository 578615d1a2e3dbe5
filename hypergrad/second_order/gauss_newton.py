"""The Gauss-Newton matrix in place of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import check_loss
from hypergrad.errors import ArgumentError
from hypergrad.problems.base import Problem
from hypergrad.problems.condition import Condition
from hypergrad.problems.step import Inner, Training
from hypergrad.second_order.base import Products
from hypergrad.second_order.exact import Exact
from hypergrad.second_order.step import Step
from hypergrad.solvers.system import Image


@final
@dataclass(frozen=True)
class GaussNewton(Products):
    r"""The generalised Gauss-Newton matrix in place of the Hessian (Schraudolph 2002, section 3).

        ∂²_θθ C̃1 ≈ Jᵀ (∂²_ff ℓ) J,    f = output(θ, λ, batch),  C̃1 = ℓ(f, λ, batch),  J = ∂f/∂θ

    Positive semidefinite wherever ℓ is convex in f, also far from an optimum; equal to the Hessian where f
    is linear in θ or ℓ has a slope of 0. A penalty is a part of ℓ: let ``output`` return ``(output,
    params)``. Only the solve uses this matrix; the term with ∂²_λθ C̃1 is computed by ``mixed``.

    Cost: a forward and a reverse derivative of the model, 4/3 of a gradient, where an exact product costs 2.

    Args:
        output: (params, hparams, batch) -> a tree of arrays.
        loss: (outputs, hparams, batch) -> scalar.
        mixed: `Exact` or `FiniteDifference`.

    Raises:
        ArgumentError: if ``output`` or ``loss`` is not a function, or ``mixed`` neither of the two; when
            used, if the loss is not scalar, or the problem has no training loss.
    """

    output: Callable[[Tree, Tree, Tree], Tree]
    loss: Callable[[Tree, Tree, Tree], Scalar]
    mixed: Products = field(default_factory=Exact)

    def __post_init__(self) -> None:
        for name in ("output", "loss"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"GaussNewton: {name} = {getattr(self, name)!r}; it must be a function")
        if not isinstance(self.mixed, Products) or isinstance(self.mixed, GaussNewton):
            raise ArgumentError(
                f"GaussNewton: mixed = {self.mixed!r}; it must be hg.Exact() or hg.FiniteDifference()"
            )

    def of(
        self, backend: Backend, problem: Problem, z: Inner, hparams: Tree, batches: list[Tree]
    ) -> Condition:
        for batch in batches:
            problem.loss_on(backend, batch, z.aux)  # raises if there is no training loss
        draws = backend.random.state()
        exact = self.mixed.of(backend, problem, z, hparams, batches)
        # Use the same random draws as in the training gradient.
        with backend.random.replay(draws):
            parts = [self._product(backend, z.params, hparams, batch) for batch in batches]

        def product(p: Tree) -> Tree:
            return vectors.mean(backend, [part(p) for part in parts])

        def both(x: Tree) -> Image:
            return exact.both(x)._replace(ax=product(x))

        return exact._replace(product=product, both=both)

    def step(
        self, training: Training, z: Inner, hparams: Tree, batch: Tree, t: Any, through_update: bool
    ) -> Step:
        """Refuse: a training step has no Hessian.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            "GaussNewton replaces a Hessian, and a single training step has none: use hg.Exact()"
        )

    def accepts(self, error: Scalar | None) -> Any:
        return self.mixed.accepts(error)

    def check(self, error: Scalar | None) -> None:
        self.mixed.check(error)

    def _product(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree) -> Callable[[Tree], Tree]:
        def model(params: Tree) -> Tree:
            return self.output(params, hparams, batch)

        def loss_gradient(outputs: Tree) -> Tree:
            value, pull = backend.pullback(lambda f: self.loss(f, hparams, batch), outputs)
            check_loss(backend, "GaussNewton's loss", value)
            return pull(backend.xp.ones_like(value))[0]

        draws = backend.random.state()
        outputs, push, _ = backend.linearize(lambda params: (model(params), None), params)
        with backend.random.replay(draws):
            _, pull = backend.pullback(model, params)
        _, curvature = backend.pullback(loss_gradient, outputs)
        return lambda p: pull(curvature(push(p))[0])[0]
