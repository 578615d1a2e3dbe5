"""Problems that are given by their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, final

import numpy as np

from hypergrad import vectors
from hypergrad.arguments import check_same, check_variables
from hypergrad.backend import Backend, Scalar, Tree, find_backend
from hypergrad.differences import ridders
from hypergrad.errors import ArgumentError
from hypergrad.finite import first_nonfinite
from hypergrad.problem import Problem, Validation


@final
@dataclass(frozen=True)
class Derivatives(Problem):
    r"""A bilevel problem whose derivatives are written by hand.

    For what no framework differentiates, SciPy's sparse matrices or compiled code, and where a formula is
    cheaper than its automatic derivative. Parameters and hyperparameters are trees of arrays as ever, NumPy's
    where nothing else is known; batches are whatever the functions understand.

        outer_grads       (params, hparams, batch) -> (∂_θ C2, ∂_λ C2), the latter ``None`` where it is 0
        hessian_product   (params, hparams, batch, p) -> (∂²_θθ C̃1) p
        mixed_product     (params, hparams, batch, p) -> (∂²_λθ C̃1)ᵀ p, a tree like the hyperparameters

    These three are enough for `Implicit`, at the cost of what they cost. With ``inner_grad`` it also knows
    how far from an optimum it is, and `Greedy` and `Tuner` can train. The losses themselves are for reports,
    which say 0 without them, and for `check_derivatives`.

    Args:
        inner_grad: (params, hparams, batch) -> ∇_θ C̃1.
        inner: (params, hparams, batch) -> C̃1.
        outer: (params, hparams, batch) -> C2.

    Raises:
        ArgumentError: if one is no function; when used, for trees of other structure or shape than those
            they stand for, or if one is missing.
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
                raise ArgumentError(f"Derivatives: {name} = {part!r}; it is a function")

    def inner_gradient(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree
    ) -> tuple[Scalar, Tree, Tree]:
        if self.inner_grad is None:
            raise ArgumentError("Derivatives: training needs the gradient of C̃1: give inner_grad=")
        g = self._like(backend, "inner_grad", self.inner_grad(params, hparams, batch), "params", params)
        return self._value(backend, self.inner, params, hparams, batch), g, aux

    def reached(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Tree:
        """All of them, as far as anyone can see."""
        return backend.map(lambda _: True, hparams)

    def validation_loss(self, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Scalar:
        if self.outer is None:
            raise ArgumentError("Derivatives: this needs the loss C2 itself: give outer=")
        return self.outer(params, hparams, batch)

    def validation(self, backend: Backend, params: Tree, hparams: Tree, batch: Tree, aux: Tree) -> Validation:
        found = self.outer_grads(params, hparams, batch)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise ArgumentError("Derivatives: outer_grads returns a pair (∂_θ C2, ∂_λ C2)")
        v = self._like(backend, "outer_grads", found[0], "params", params)
        direct = backend.zeros(hparams)
        if found[1] is not None:
            direct = self._like(backend, "outer_grads", found[1], "hparams", hparams)
        reached = backend.map(lambda _: found[1] is not None, hparams)
        value = self._value(backend, self.outer, params, hparams, batch)
        return Validation(value, v, direct, reached, first_nonfinite(backend, v))

    def products(
        self, backend: Backend, params: Tree, hparams: Tree, batch: Tree
    ) -> tuple[Callable[[Tree], Tree], Callable[[Tree], Tree]]:
        """Return p -> H p and p -> (∂²_λθ C̃1)ᵀ p at one point."""

        def hessian(p: Tree) -> Tree:
            found = self.hessian_product(params, hparams, batch, p)
            return self._like(backend, "hessian_product", found, "params", params)

        def mixed(p: Tree) -> Tree:
            found = self.mixed_product(params, hparams, batch, p)
            return self._like(backend, "mixed_product", found, "hparams", hparams)

        return hessian, mixed

    @staticmethod
    def _like(backend: Backend, name: str, given: Tree, root: str, expected: Tree) -> Tree:
        check_same(backend, f"Derivatives: {name}", given, root, expected)
        return given

    @staticmethod
    def _value(backend: Backend, loss: Any, params: Tree, hparams: Tree, batch: Tree) -> Scalar:
        if loss is not None:
            return loss(params, hparams, batch)
        # Nothing is known of it, and nothing is wrong with it.
        return backend.asarray(0.0, like=backend.flatten(params)[0][0])


class DerivativeCheck(NamedTuple):
    """Relative errors of derivatives given by hand, along random directions; ``None`` where unchecked."""

    outer_grads: float | None
    inner_grad: float | None
    hessian_product: float | None
    mixed_product: float | None
    symmetry: float

    def __str__(self) -> str:
        rows = [
            f"  {name:16} {'not checked' if error is None else f'{error:.1e}'}"
            for name, error in zip(self._fields, self, strict=True)
        ]
        return "\n".join(["derivatives against central differences, relative error", *rows])


def check_derivatives(
    problem: Derivatives,
    params: Tree,
    hparams: Tree,
    train: Any,
    val: Any,
    *,
    directions: int = 5,
    seed: int = 0,
    backend: Backend | str | None = None,
) -> DerivativeCheck:
    r"""Compare each derivative of a `Derivatives` problem with central differences of the one below it.

        ⟨∂C2, d⟩          with differences of ``outer`` along d, in θ and λ together
        ⟨∇_θ C̃1, d⟩       with differences of ``inner``
        ⟨q, H p⟩          with differences of ⟨q, inner_grad⟩ along p, and with ⟨p, H q⟩
        ⟨(∂²_λθ C̃1)ᵀ p, d⟩ with differences of ⟨p, inner_grad⟩ along d, in λ

    The differences are extrapolated as in `check_hypergradient`. Cost: some 24 evaluations a direction. What
    stands on a function that is not given is not checked; ``symmetry`` always is.

    Args:
        problem, params, hparams: the problem, and the point.
        train, val: one batch of each.
        directions: random directions, of which the largest relative error counts.
        seed: of the directions.
        backend: found from the arrays if it is not given.

    Raises:
        ArgumentError: for a problem that is not given by its derivatives, and as they do.
    """
    if not isinstance(problem, Derivatives):
        raise ArgumentError(
            "check_derivatives takes an hg.Derivatives problem; of others check_hypergradient checks the end"
        )
    found = find_backend(params, hparams, backend=backend)
    check_variables(found, params=params, hparams=hparams)
    rng = np.random.default_rng(seed)
    hessian, mixed = problem.products(found, params, hparams, train)
    outer, inner, inner_grad = problem.outer, problem.inner, problem.inner_grad
    worst: dict[str, float] = {}

    def draw(tree: Tree) -> Tree:
        def leaf(x: Any) -> Any:
            return found.asarray(rng.normal(size=found.describe(x).shape), like=x)

        return found.map(leaf, tree)

    def dot(x: Tree, y: Tree) -> float:
        return float(found.to_numpy(found.inner(x, y)))

    def compare(name: str, given: float, scale: float, f: Callable[[float], Any]) -> None:
        slope, _ = ridders(lambda h: float(found.to_numpy(f(h))), 0.1)
        error = abs(given - slope) / max(abs(slope), 1e-3 * scale, 1e-300)
        worst[name] = max(worst.get(name, 0.0), error)

    def size(x: Tree) -> float:
        return float(found.to_numpy(vectors.norm(found, x)))

    def moved(d: Tree, tree: Tree) -> Callable[[float], Tree]:
        return lambda h: found.axpy(h, d, tree)

    for _ in range(directions):
        d, p, q = draw(hparams), draw(params), draw(params)
        theta, lam = moved(p, params), moved(d, hparams)
        if outer is not None:
            at = problem.validation(found, params, hparams, val, ())
            scale = size(at.v) * size(p) + size(at.direct) * size(d)
            slope = dot(at.v, p) + dot(at.direct, d)
            compare("outer_grads", slope, scale, lambda h: outer(theta(h), lam(h), val))  # noqa: B023
        if inner is not None and inner_grad is not None:
            g = inner_grad(params, hparams, train)
            compare(
                "inner_grad",
                dot(g, p),
                size(g) * size(p),
                lambda h: inner(theta(h), hparams, train),  # noqa: B023
            )
        hp, hq, mp = hessian(p), hessian(q), mixed(p)
        there, back = dot(q, hp), dot(p, hq)
        gap = abs(there - back) / max(abs(there), 1e-3 * size(hp) * size(q), 1e-300)
        worst["symmetry"] = max(worst.get("symmetry", 0.0), gap)
        if inner_grad is not None:
            compare(
                "hessian_product", there, size(hp) * size(q),
                lambda h: found.inner(q, inner_grad(theta(h), hparams, train)),  # noqa: B023
            )  # fmt: skip
            compare(
                "mixed_product", dot(mp, d), size(mp) * size(d),
                lambda h: found.inner(p, inner_grad(params, lam(h), train)),  # noqa: B023
            )  # fmt: skip
    return DerivativeCheck(*(worst.get(name) for name in DerivativeCheck._fields))  # type: ignore[arg-type]
