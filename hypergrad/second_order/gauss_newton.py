"""What stands for the Hessian in an implicit hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import check_scalar
from hypergrad.errors import ArgumentError


@final
@dataclass(frozen=True)
class GaussNewton:
    r"""The generalised Gauss-Newton matrix in place of the Hessian (Schraudolph 2002, section 3).

        H ≈ Jᵀ (∂²_ff ℓ) J,    f = model_output(θ, λ, batch),  C̃1 = ℓ(f, λ, batch),  J = ∂f/∂θ

    Positive semidefinite wherever ℓ is convex in f, also far from an optimum; equal to H where f is linear in
    θ or ℓ has a slope of 0. A penalty belongs to ℓ: let ``model_output`` return ``(output, params)``. Only
    the solve uses it, the mixed term stays exact.

    Cost: the model's derivative forth and back, 4/3 of a gradient where a product with H is 2.

    Args:
        model_output: (params, hparams, batch) -> a tree of arrays.
        loss: (outputs, hparams, batch) -> scalar.

    Raises:
        ArgumentError: if either is no function; when used, if the loss is not scalar.
    """

    model_output: Callable[[Tree, Tree, Tree], Tree]
    loss: Callable[[Tree, Tree, Tree], Scalar]

    def __post_init__(self) -> None:
        for name in ("model_output", "loss"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"GaussNewton: {name} = {getattr(self, name)!r}; it is a function")

    def products(
        self, backend: Backend, params: Tree, hparams: Tree, batches: list[Tree], draws: Any = None
    ) -> Callable[[Tree], Tree]:
        """Linearise once: p -> Jᵀ (∂²ℓ) J p, the mean over the batches.

        ``draws`` is the state of the framework's generator with which the training gradient began.
        """
        with backend.random.replay(backend.random.state() if draws is None else draws):
            parts = [self._product(backend, params, hparams, batch) for batch in batches]
        return lambda p: vectors.mean(backend, [part(p) for part in parts])

    def _product(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree) -> Callable[[Tree], Tree]:
        def model(params: Tree) -> Tree:
            return self.model_output(params, hparams, batch)

        def slope(outputs: Tree) -> Tree:
            value, pull = backend.pullback(lambda f: self.loss(f, hparams, batch), outputs)
            check_scalar(backend, "GaussNewton's loss", value)
            return pull(backend.xp.ones_like(value))[0]

        draws = backend.random.state()
        outputs, push, _ = backend.linearize(lambda params: (model(params), None), params)
        with backend.random.replay(draws):
            _, pull = backend.pullback(model, params)
        _, bend = backend.pullback(slope, outputs)
        return lambda p: pull(bend(push(p))[0])[0]
