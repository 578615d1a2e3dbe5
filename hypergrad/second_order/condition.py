r"""The condition G(θ, λ) = 0 that parameters are the solution of, and products with its derivatives.

    G = ∇_θ C̃1          an optimum
    G = θ − φ(θ, λ)     a fixed point: of a map, or of training by an update rule Φ

By the implicit function theorem dC2/dλ = ∂_λ C2 − (∂_λ G)ᵀ x with (∂_θ G)ᵀ x = ∇_θ C2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.problems.base import Problem
from hypergrad.problems.bilevel import Bilevel
from hypergrad.problems.derivatives import Derivatives
from hypergrad.problems.losses import evaluate
from hypergrad.problems.step import Inner, Training, inner_gradient
from hypergrad.second_order.differences import FiniteDifference
from hypergrad.updates import UpdateRule


class Stationary(NamedTuple):
    """G at a point, and products: p -> (∂_θ G)ᵀ p, and x -> both (∂_θ G)ᵀ x and (∂_λ G)ᵀ x, with their error.

    ``value`` is C̃1 there; ``residual`` is G, or ``None`` where nobody knows it. ``spent`` says what so many
    products of a solve have cost, these two included.
    """

    value: Scalar
    residual: Tree | None
    product: Callable[[Tree], Tree]
    both: Callable[[Tree], tuple[Tree, Tree, Scalar]]
    responds: Callable[[], Tree]
    spent: Callable[[Scalar], dict[str, Any]]


def stationary(
    backend: Backend,
    problem: Problem,
    z: Inner,
    hparams: Tree,
    batches: list[Tree],
    rule: UpdateRule | None = None,
    mixed: FiniteDifference | None = None,
) -> Stationary:
    """G averaged over the batches, by whichever derivatives there are.

    Raises:
        ArgumentError: for differences of a problem without a loss.
    """
    if isinstance(problem, Derivatives):
        return by_hand(backend, problem, z, hparams, batches)
    if mixed is None:
        return exact(backend, problem, z, hparams, batches, rule)
    if not isinstance(problem, Bilevel):
        raise ArgumentError(
            f"FiniteDifference differences a training loss, and {type(problem).__name__} has none"
        )
    return by_differences(backend, problem, z, hparams, batches, mixed)


def exact(
    backend: Backend, problem: Problem, z: Inner, hparams: Tree, batches: list[Tree], rule: UpdateRule | None
) -> Stationary:
    """One graph of G, pulled back through for each product."""

    def condition(params: Tree, hparams: Tree) -> tuple[Tree, tuple[Scalar, Tree]]:
        value, g = residual(backend, problem, z._replace(params=params), hparams, batches, rule)
        return g, (value, g)

    _, pullback, (value, g) = backend.vjp(condition, z.params, hparams)

    def spent(products: Scalar) -> dict[str, Any]:
        count = len(batches)
        return {
            "gradients": count + 1,
            "products": count * (products + 1),
            "bytes_held": pullback.nbytes,
        }

    return Stationary(
        value,
        g,
        pullback.onto(0),
        lambda x: (*pullback(x), float("nan")),
        lambda: pullback.reached[1],
        spent,
    )


def by_hand(
    backend: Backend, problem: Derivatives, z: Inner, hparams: Tree, batches: list[Tree]
) -> Stationary:
    """The user's own products."""
    pairs = [problem.products(backend, z.params, hparams, batch) for batch in batches]

    def mean(k: int, x: Tree) -> Tree:
        return vectors.mean(backend, [pair[k](x) for pair in pairs])

    value, g = backend.asarray(0.0, like=backend.flatten(z.params)[0][0]), None
    if problem.inner_grad is not None:
        value, g = residual(backend, problem, z, hparams, batches)

    def spent(products: Scalar) -> dict[str, Any]:
        count = len(batches)
        gradients = 1 + (0 if g is None else count)
        return {"gradients": gradients, "products": count * (products + 1), "bytes_held": 0}

    return Stationary(
        value,
        g,
        lambda p: mean(0, p),
        lambda x: (mean(0, x), mean(1, x), float("nan")),
        lambda: backend.map(lambda _: True, hparams),
        spent,
    )


def by_differences(
    backend: Backend,
    problem: Bilevel,
    z: Inner,
    hparams: Tree,
    batches: list[Tree],
    mixed: FiniteDifference,
) -> Stationary:
    """First-order gradients alone, at two points for each product."""
    draws = backend.random.state()

    def losses(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
        values = [problem.loss_on(backend, batch, z.aux)(params, hparams)[0] for batch in batches]
        return sum(values[1:], values[0]) / len(batches), ()

    def slopes(params: Tree) -> Tree:
        with backend.random.replay(draws):
            value, pullback, _ = backend.vjp(losses, params, hparams)
        return pullback(backend.xp.ones_like(value))

    value, pullback, _ = evaluate(backend, "inner", losses, batches, z.params, hparams)
    base = pullback(backend.xp.ones_like(value))

    def product(p: Tree) -> Tree:
        return mixed.roughly(backend, lambda theta: slopes(theta)[0], z.params, p, base[0])

    def both(x: Tree) -> tuple[Tree, Tree, Scalar]:
        (hx, slope), error, _ = mixed.along(backend, slopes, z.params, x, base)
        return hx, slope, error

    def spent(products: Scalar) -> dict[str, Any]:
        last = 2 if mixed.estimate_error else 1
        gradients = len(batches) * (1 + mixed.sides * (products + last)) + 1
        return {"gradients": gradients, "products": 0, "bytes_held": 0}

    return Stationary(value, base[0], product, both, lambda: pullback.reached[1], spent)


def residual(
    backend: Backend,
    problem: Problem,
    z: Inner,
    hparams: Tree,
    batches: list[Tree],
    rule: UpdateRule | None = None,
) -> tuple[Scalar, Tree]:
    """C̃1 and G, averaged over the batches given; the auxiliary state stays as it is."""
    found = [_one(backend, problem, z, hparams, batch, rule) for batch in batches]
    # Apart: a framework that adds all leaves at once would make C̃1 a part of G's graph.
    value, g = (vectors.mean(backend, list(part)) for part in zip(*found, strict=True))
    return value, g


def _one(
    backend: Backend, problem: Problem, z: Inner, hparams: Tree, batch: Tree, rule: UpdateRule | None
) -> tuple[Scalar, Tree]:
    value, g, _ = inner_gradient(backend, problem, z, hparams, batch)
    if rule is None:
        return value, g
    after = Training(backend, problem, rule).apply(g, z, hparams, 0)
    return value, vectors.subtract(backend, z.params, after.params)
