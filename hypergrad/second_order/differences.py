"""Products as directional differences of first-order gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

from hypergrad.backend import Array, Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, DifferenceError
from hypergrad.problems.base import Problem
from hypergrad.problems.condition import Condition, Spent
from hypergrad.problems.losses import evaluate
from hypergrad.problems.step import Inner, Training
from hypergrad.second_order.base import Products
from hypergrad.second_order.step import Gradient, PulledBack, Step, step_with_mixed_term
from hypergrad.solvers.system import Image

Slopes = Callable[[Tree], Tree]
"""θ -> first-order derivatives of C̃1 there, with the same random draws each time."""

Loss = Callable[[Tree, Tree], tuple[Scalar, Tree]]
"""(θ, λ) -> C̃1 and whatever else."""


class Difference(NamedTuple):
    """A product, the estimate of its relative error if there is one, and the number of gradients it took."""

    product: Tree
    error: Scalar | None
    gradients: int


@final
@dataclass(frozen=True)
class FiniteDifference(Products):
    r"""The product (∂²_θ∂ C̃1)ᵀ u as a directional difference of ∂C̃1 (Liu et al. 2019, eq. 8).

        sides=2:  D(ε) = [∂C̃1(θ + εu) − ∂C̃1(θ − εu)] / 2ε      error O(ε²)
        sides=1:  D(ε) = [∂C̃1(θ + εu) − ∂C̃1(θ)] / ε            error O(ε)

    For losses without a second derivative: fused attention, cuDNN's recurrent nets, custom functions,
    sharded and compiled modules. ‖εu‖ = r (1 + ‖θ‖), and by default r is the cube root of the precision for
    two sides and its square root for one, which balances truncation against rounding.

    The product is computed at ε and at 2ε, and the one at ε is returned. Their difference estimates the
    error, and so does ε times the difference of their second differences (two sides); the larger of the two
    counts, relative to the product. Where the gradient is smooth it bounds the truncation error. Through
    kinks (ReLU, max pooling) the gradient is *discontinuous*, in θ and in a noise scale, and a difference can
    be plainly wrong at any usable radius: the two products then disagree, and the estimate fails. They may
    agree by chance, which is not rare for a single hyperparameter and one side: prefer two sides, or smooth
    activations.

    Cost: 4 gradients for two sides, 2 for one. A gradient by the hyperparameters alone costs two thirds.

    Args:
        sides: 2, or 1 for half the cost.
        radius: r.
        tolerance: the largest relative error that is accepted; infinity accepts any.
        estimate_error: use the second radius. Without it the cost is half, and the error is neither estimated
            nor checked.

    Raises:
        ArgumentError: for arguments out of range.
    """

    sides: Literal[1, 2] = 2
    radius: float | None = None
    tolerance: float = 1e-2
    estimate_error: bool = True

    def __post_init__(self) -> None:
        if self.sides not in (1, 2) or isinstance(self.sides, bool):
            raise ArgumentError(f"FiniteDifference: sides = {self.sides!r}; it must be 1 or 2")
        if self.radius is not None and not (is_number(self.radius) and 0 < self.radius < float("inf")):
            raise ArgumentError(f"FiniteDifference: radius = {self.radius!r}; it must be a positive number")
        if not (is_number(self.tolerance) and self.tolerance > 0):
            raise ArgumentError(
                f"FiniteDifference: tolerance = {self.tolerance!r}; it must be a positive number"
            )

    def of(
        self, backend: Backend, problem: Problem, z: Inner, hparams: Tree, batches: list[Tree]
    ) -> Condition:
        """Return products from first-order gradients alone, at two points for each."""
        draws = backend.random.state()

        def mean_loss(params: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
            values = [problem.loss_on(backend, batch, z.aux)(params, hparams)[0] for batch in batches]
            return sum(values[1:], values[0]) / len(batches), None

        def slopes(params: Tree) -> tuple[Tree, ...]:
            with backend.random.replay(draws):
                value, pullback, _ = backend.vjp(mean_loss, params, hparams)
            return pullback(backend.xp.ones_like(value))

        value, pullback, _ = evaluate(backend, "inner", mean_loss, batches, z.params, hparams)
        base = pullback(backend.xp.ones_like(value))

        def product(p: Tree) -> Tree:
            return self._product(backend, lambda theta: slopes(theta)[0], z.params, p, base[0])

        last: list[Tree] = []

        def both(x: Tree) -> Image:
            (hx, mixed), error, _ = self._with_error(backend, slopes, z.params, x, base)
            last[:] = [mixed]
            return Image(hx, mixed, error)

        def reached() -> Tree:
            mixed = last[0] if last else backend.zeros(hparams)
            return _responding(backend, mean_loss, z.params, hparams, pullback.reached[1], mixed)

        def spent(products: Scalar) -> Spent:
            last = 2 if self.estimate_error else 1
            return Spent(len(batches) * (1 + self.sides * (products + last)) + 1, 0)

        return Condition(value, base[0], product, both, reached, spent)

    def step(
        self, training: Training, z: Inner, hparams: Tree, batch: Tree, t: Any, through_update: bool
    ) -> Step:
        """Pull back through the optimiser exactly, and take differences of C̃1."""
        backend = training.backend
        loss, draws = training.problem.loss_on(backend, batch, z.aux), backend.random.state()

        def slopes(params: Tree) -> Tree:
            with backend.random.replay(draws):
                value, pullback, _ = backend.vjp(lambda h: loss(params, h), hparams)
            return pullback(backend.xp.ones_like(value))[0]

        value, pullback, aux = evaluate(backend, "inner", loss, batch, z.params, hparams)
        g, base = pullback(backend.xp.ones_like(value))

        def mixed(u: Tree) -> PulledBack:
            product, error, gradients = self._with_error(backend, slopes, z.params, u, base)
            reached = _responding(backend, loss, z.params, hparams, pullback.reached[1], product)
            return PulledBack(product, reached, Spent(2 + gradients, 0), error)

        at = Gradient(value, g, aux)
        return step_with_mixed_term(training, z, hparams, t, through_update, at, mixed)

    def _with_error(self, backend: Backend, slopes: Slopes, theta: Tree, u: Tree, base: Tree) -> Difference:
        """Return the product with u and its error; ``base`` holds the slopes at θ itself."""
        epsilon = self._epsilon(backend, theta, u)
        near, near_second = self._at(backend, slopes, theta, u, base, epsilon)
        if not self.estimate_error:
            return Difference(near, None, self.sides)
        far, far_second = self._at(backend, slopes, theta, u, base, 2.0 * epsilon)
        norm = vectors.norm(backend, near)
        gap = vectors.norm(backend, vectors.subtract(backend, far, near))
        second_gap = epsilon * vectors.norm(backend, vectors.subtract(backend, far_second, near_second))
        xp = backend.xp
        error = xp.maximum(gap, second_gap) / xp.where(norm > 0, norm, xp.ones_like(norm))
        return Difference(near, error, 2 * self.sides)

    def _product(self, backend: Backend, slopes: Slopes, theta: Tree, u: Tree, base: Tree) -> Tree:
        """Return the product with u without its error, at half the cost."""
        return self._at(backend, slopes, theta, u, base, self._epsilon(backend, theta, u))[0]

    def check(self, error: Scalar | None) -> None:
        if error is not None and not bool(self.accepts(error)):
            raise DifferenceError(float(error), self.tolerance)

    def accepts(self, error: Scalar | None) -> Any:
        return error is None or self.tolerance == float("inf") or error <= self.tolerance

    def _epsilon(self, backend: Backend, theta: Tree, u: Tree) -> Scalar:
        xp, size = backend.xp, vectors.norm(backend, u)
        precision = float(xp.finfo(size.dtype).eps)
        radius = self.radius or precision ** (1 / 3 if self.sides == 2 else 1 / 2)
        length = radius * (1.0 + vectors.norm(backend, theta))
        return length / xp.where(size > 0, size, xp.ones_like(size))

    def _at(
        self, backend: Backend, slopes: Slopes, theta: Tree, u: Tree, base: Tree, epsilon: Scalar
    ) -> tuple[Tree, Tree]:
        """Return the first and the second difference; with one side, 0 in place of the second."""
        rise = vectors.subtract(backend, slopes(backend.axpy(epsilon, u, theta)), base)
        if self.sides == 1:
            return vectors.scale(backend, 1.0 / epsilon, rise), backend.zeros(base)
        fall = vectors.subtract(backend, base, slopes(backend.axpy(-epsilon, u, theta)))
        first = vectors.scale(backend, 0.5 / epsilon, vectors.add(backend, rise, fall))
        return first, vectors.scale(backend, epsilon**-2, vectors.subtract(backend, rise, fall))


def _responding(backend: Backend, loss: Loss, params: Tree, hparams: Tree, used: Tree, mixed: Tree) -> Tree:
    """Return which of the hyperparameters that C̃1 uses ∇_θ C̃1 depends on, given a mixed term.

    Where the term is not exactly 0 that is clear. Where it is, or cannot be read, the graph of the gradient
    decides, which is not differentiated.
    """
    flags, unflatten = backend.flatten(used)
    terms = backend.flatten(mixed)[0]
    clear = [not flag or _is_nonzero(backend, term) for flag, term in zip(flags, terms, strict=True)]
    if all(clear):
        return used

    def gradient(lam: Tree) -> tuple[Tree, None]:
        value, pullback, _ = backend.vjp(lambda theta: loss(theta, lam), params)
        one = backend.detach(backend.xp.ones_like(value))  # its shape alone comes from λ
        return pullback(one)[0], None

    with backend.random.replay(backend.random.state()), backend.as_called():
        responds = backend.flatten(backend.uses(gradient, hparams)[0])[0]
    return unflatten(
        [flag and (known or found) for flag, known, found in zip(flags, clear, responds, strict=True)]
    )


def _is_nonzero(backend: Backend, term: Array) -> bool:
    return backend.readable(term) and bool(backend.xp.any(term != 0))
