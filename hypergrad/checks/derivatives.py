"""A comparison of derivatives written by hand with finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hypergrad.backend import Backend, Tree, find_backend, vectors
from hypergrad.backend.arguments import check_variables
from hypergrad.checks.ridders import ridders
from hypergrad.errors import ArgumentError
from hypergrad.problems.derivatives import Derivatives


class DerivativeCheck(NamedTuple):
    """Relative errors of derivatives written by hand, along random directions; ``None`` if unchecked."""

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
    r"""Compare each derivative of a `Derivatives` problem with central differences of the function it is of.

        ⟨∂C2, d⟩          with differences of ``outer`` along d, in θ and λ together
        ⟨∇_θ C̃1, d⟩       with differences of ``inner``
        ⟨q, H p⟩          with differences of ⟨q, inner_grad⟩ along p, and with ⟨p, H q⟩
        ⟨(∂²_λθ C̃1)ᵀ p, d⟩ with differences of ⟨p, inner_grad⟩ along d, in λ

    The differences are extrapolated as in `check_hypergradient`. Cost: about 24 evaluations a direction. A
    derivative is not checked if the problem lacks the function that it is of; ``symmetry`` always is.

    Args:
        problem, params, hparams: the problem, and the point.
        train, val: one batch of each.
        directions: how many random directions; the largest relative error of them is returned.
        seed: the seed of the directions.
        backend: found from the arrays if it is not given.

    Raises:
        ArgumentError: if the problem is not a `Derivatives`, and as its functions do.
    """
    if not isinstance(problem, Derivatives):
        raise ArgumentError(
            "check_derivatives takes an hg.Derivatives problem; for others use hg.check_hypergradient"
        )
    backend = find_backend(params, hparams, backend=backend)
    check_variables(backend, params=params, hparams=hparams)
    rng = np.random.default_rng(seed)
    hessian, mixed = problem.products(backend, params, hparams, train)
    outer, inner, inner_grad = problem.outer, problem.inner, problem.inner_grad
    worst: dict[str, float] = {}

    def draw(tree: Tree) -> Tree:
        def leaf(x: Any) -> Any:
            return backend.asarray(rng.normal(size=backend.describe(x).shape), like=x)

        return backend.map(leaf, tree)

    def dot(x: Tree, y: Tree) -> float:
        return float(backend.to_numpy(backend.inner(x, y)))

    def compare(name: str, given: float, scale: float, f: Callable[[float], Any]) -> None:
        slope, _ = ridders(lambda h: float(backend.to_numpy(f(h))), 0.1)
        error = abs(given - slope) / max(abs(slope), 1e-3 * scale, 1e-300)
        worst[name] = max(worst.get(name, 0.0), error)

    def size(x: Tree) -> float:
        return float(backend.to_numpy(vectors.norm(backend, x)))

    def line(tree: Tree, d: Tree) -> Callable[[float], Tree]:
        return lambda h: backend.axpy(h, d, tree)

    for _ in range(directions):
        d, p, q = draw(hparams), draw(params), draw(params)
        theta, lam = line(params, p), line(hparams, d)
        if outer is not None:
            validation = problem.validation(backend, params, hparams, val, ())
            scale = size(validation.v) * size(p) + size(validation.direct) * size(d)
            slope = dot(validation.v, p) + dot(validation.direct, d)
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
        qhp, phq = dot(q, hp), dot(p, hq)
        gap = abs(qhp - phq) / max(abs(qhp), 1e-3 * size(hp) * size(q), 1e-300)
        worst["symmetry"] = max(worst.get("symmetry", 0.0), gap)
        if inner_grad is not None:
            compare(
                "hessian_product", qhp, size(hp) * size(q),
                lambda h: backend.inner(q, inner_grad(theta(h), hparams, train)),  # noqa: B023
            )  # fmt: skip
            compare(
                "mixed_product", dot(mp, d), size(mp) * size(d),
                lambda h: backend.inner(p, inner_grad(params, lam(h), train)),  # noqa: B023
            )  # fmt: skip
    return DerivativeCheck(*(worst.get(name) for name in DerivativeCheck._fields))  # type: ignore[arg-type]
