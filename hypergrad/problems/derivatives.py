"""Problems that are given by their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import check_same
from hypergrad.backend.finite import first_nonfinite
from hypergrad.errors import ArgumentError
from hypergrad.problems.base import Problem, Validation
from hypergrad.problems.condition import Condition, Spent
from hypergrad.solvers.system import Image


@final
@dataclass(frozen=True)
class Derivatives(Problem):
    r"""A bilevel problem whose derivatives are written by hand.

    Use it for what no framework differentiates, such as SciPy's sparse matrices or compiled code, and where
    a formula is cheaper than automatic differentiation. Parameters and hyperparameters are trees of arrays as
    usual, by default NumPy's; batches may be anything that the functions accept.

        outer_grads       (params, hparams, batch) -> (∂_θ C2, ∂_λ C2), the latter ``None`` where it is 0
        hessian_product   (params, hparams, batch, p) -> (∂²_θθ C̃1) p
        mixed_product     (params, hparams, batch, p) -> (∂²_λθ C̃1)ᵀ p, a tree like the hyperparameters

    These three are enough for `Implicit`. With ``inner_grad`` it can also measure how far from an optimum it
    is, and `Greedy` and `Tuner` can train. The losses themselves are used only in reports, which show 0
    without them, and by `check_derivatives`.

    Args:
        inner_grad: (params, hparams, batch) -> ∇_θ C̃1.
        inner: (params, hparams, batch) -> C̃1.
        outer: (params, hparams, batch) -> C2.

    Raises:
        ArgumentError: if an argument is not a function; when used, if a function that is needed is missing,
            or returns a tree of the wrong structure or shape.
    """

    by_hand: ClassVar[bool] = True

    outer_grads: Callable[[Tree, Tree, Any], tuple[Tree, Tree]]
    hessian_product: Callable[[Tree, Tree, Any, Tree], Tree]
    mixed_product: Callable[[Tree, Tree, Any, Tree], Tree]
    inner_grad: Callable[[Tree, Tree, Any], Tree] | None = field(default=None, kw_only=True)
    inner: Callable[[Tree, Tree, Any], Scalar] | None = field(default=None, kw_only=True)
    outer: Callable[[Tree, Tree, Any], Scalar] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("outer_grads", "hessian_product", "mixed_product", "inner_grad", "inner", "outer"):
            part, optional = getattr(self, name), name in ("inner_grad", "inner", "outer")
            if not (callable(part) or (optional and part is None)):
                raise ArgumentError(f"Derivatives: {name} = {part!r}; it must be a function")

    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        if self.inner_grad is None:
            raise ArgumentError("Derivatives: training needs the gradient of C̃1: pass inner_grad=")
        g = self._like(backend, "inner_grad", self.inner_grad(params, hparams, batch), "params", params)
        return self._value(backend, self.inner, params, hparams, batch), g, aux

    def uses(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        """Return True for every hyperparameter: no graph shows which are used."""
        return backend.map(lambda _: True, hparams)

    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        if self.outer is None:
            raise ArgumentError("Derivatives: this needs the loss C2 itself: pass outer=")
        return self.outer(params, hparams, batch)

    def validation(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Validation:
        pair = self.outer_grads(params, hparams, batch)
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ArgumentError("Derivatives: outer_grads must return a pair (∂_θ C2, ∂_λ C2)")
        v = self._like(backend, "outer_grads", pair[0], "params", params)
        direct, given = backend.zeros(hparams), pair[1] is not None
        if given:
            direct = self._like(backend, "outer_grads", pair[1], "hparams", hparams)
        reached = backend.map(lambda _: given, hparams)
        value = self._value(backend, self.outer, params, hparams, batch)
        return Validation(value, v, direct, reached, first_nonfinite(backend, v), lambda: reached)

    def condition(
        self, backend: Backend, params: Tree, hparams: Tree, batches: list[Tree], aux: Tree
    ) -> Condition:
        """Return G, if it is given, and the user's own products."""
        pairs = [self.products(backend, params, hparams, batch) for batch in batches]

        def mean(k: int, x: Tree) -> Tree:
            return vectors.mean(backend, [pair[k](x) for pair in pairs])

        value, g = backend.asarray(0.0, like=backend.flatten(params)[0][0]), None
        if self.inner_grad is not None:
            value, g = self.residual(backend, params, hparams, batches, aux)
        count = len(batches)
        gradients = 1 + (0 if g is None else count)
        return Condition(
            value,
            g,
            lambda p: mean(0, p),
            lambda x: Image(mean(0, x), mean(1, x)),
            lambda: backend.map(lambda _: True, hparams),
            lambda products: Spent(gradients, count * (products + 1)),
        )

    def products(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree
    ) -> tuple[Callable[[Tree], Tree], Callable[[Tree], Tree]]:
        """Return p -> H p and p -> (∂²_λθ C̃1)ᵀ p at one point."""

        def hessian(p: Tree) -> Tree:
            hp = self.hessian_product(params, hparams, batch, p)
            return self._like(backend, "hessian_product", hp, "params", params)

        def mixed(p: Tree) -> Tree:
            bp = self.mixed_product(params, hparams, batch, p)
            return self._like(backend, "mixed_product", bp, "hparams", hparams)

        return hessian, mixed

    @staticmethod
    def _like(backend: Backend, name: str, given: Tree, root: str, expected: Tree) -> Tree:
        check_same(backend, f"Derivatives: {name}", given, root, expected)
        return given

    @staticmethod
    def _value(backend: Backend, loss: Any, params: Tree, hparams: Tree, batch: Tree) -> Scalar:
        if loss is not None:
            return loss(params, hparams, batch)
        # A loss that is not given counts as 0: it is finite, so no check of the value fails.
        return backend.asarray(0.0, like=backend.flatten(params)[0][0])
