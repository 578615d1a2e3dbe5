"""The Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Scalar, Tree, vectors
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import Iterative, check_count, check_positive, check_tolerance, rounding
from hypergrad.solvers.numbers import on_numpy_scalars
from hypergrad.solvers.system import Solution, System

_POWER_STEPS = 10
_GROWING_TERMS = 3


class _Series(NamedTuple):
    x: Tree
    term: Tree
    size: Scalar
    stretch: Scalar
    growth: Scalar
    negative: Any
    grown: Any
    k: Any
    curvature: Scalar


@final
@dataclass(frozen=True)
class Neumann(Iterative):
    r"""The truncated Neumann series (Lorraine et al. 2020, algorithm 3).

        x = η Σ_{k<K} (I − ηA)ᵏ v,    K: max_steps,  η: step_size

    At a fixed point of gradient descent with learning rate η, K terms give the hypergradient of the last K
    steps: `Unrolled(SGD(η), truncate=K)`. Costs K products. Without ``rtol`` the bias of K terms is accepted;
    with it, the series stops when ‖Ax − v‖/‖v‖ ≤ rtol, or fails. Three growing terms in a row are a
    divergence: either the step is too large, and the error gives the largest stable one, or A has negative
    curvature, which is reported if the last term shows it. For the fixed point of a map φ, where A is I − ∂φ
    and η is 1, the terms are K steps of the map, transposed.

    Args:
        max_steps: the number K of terms.
        step_size: η; by default 1 over the largest eigenvalue of A, estimated by ten power iterations, or 1
            for a system that is not symmetric.
        rtol: the relative residual to reach, if any.
        fresh: use another batch of T1 for the Hessian of each product, from a list in turn or from a function
            ``t -> batch`` from this step on (Lorraine et al. 2020). Costs one more gradient per product.

    Raises:
        ArgumentError: for numbers out of range; for ``fresh`` with ``rtol``, since the matrix changes with
            each product and no residual can be promised; for ``fresh`` where there are no other batches.
    """

    max_steps: int = 20
    step_size: float | None = None
    rtol: float | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        check_count("Neumann", "max_steps", self.max_steps)
        check_tolerance("Neumann", self.rtol)
        if self.step_size is not None:
            check_positive("Neumann", "step_size", self.step_size)
        if self.fresh and self.rtol is not None:
            raise ArgumentError(
                "Neumann: with fresh=True the matrix changes with each product, so no residual can be "
                "promised: leave rtol out"
            )

    @property
    def differentiable(self) -> bool:
        return not self.fresh

    @property
    def resamples(self) -> bool:
        return self.fresh

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system = system.begun()
        solution = self._sum(system)
        return solution._replace(products=solution.products + system.spent)

    @on_numpy_scalars
    def _sum(self, system: System) -> Solution:
        backend, product, eta, spent = system.backend, self._product(system), self.step_size, 0
        xp, axpy = backend.xp, backend.axpy
        if eta is None and system.symmetric:
            eta, spent = 1.0 / _largest_eigenvalue(system, product), _POWER_STEPS
        elif eta is None:
            eta = 1.0
        size, target = vectors.norm(backend, system.r), self.target(system)
        threshold, one, zero = 1 + 10 * rounding(backend, size), xp.ones_like(size), 0.0 * size

        # The remainder v − A x_k is the term (I − ηA)ᵏ v itself, so the residual costs no product.
        def going(s: _Series) -> Any:
            return (s.k < self.max_steps) & (s.size > target) & (s.grown < _GROWING_TERMS)

        def body(s: _Series) -> _Series:
            x, a_term = axpy(eta, s.term, s.x), product(s.term, spent + s.k)
            term = axpy(-eta, a_term, s.term)
            new, stretch = vectors.norm(backend, term), vectors.norm(backend, a_term)
            return _Series(
                x,
                term,
                new,
                stretch,
                stretch / xp.where(s.stretch > 0, s.stretch, one),
                backend.inner(s.term, a_term) < (1 - threshold) * stretch * s.size,
                xp.where(new > threshold * s.size, s.grown + 1, 0),
                s.k + 1,
                xp.maximum(s.curvature, stretch / s.size),
            )

        start = _Series(system.x, system.r, size, zero, zero, size < 0, 0, 0, zero + system.curvature)
        end: _Series = self.iterate(system, going, body, start, self.max_steps)
        grown = end.grown >= _GROWING_TERMS
        negative = end.negative & system.symmetric
        reason = xp.where(negative, int(Failure.NEGATIVE_CURVATURE), int(Failure.DIVERGED))
        failure = self.final_failure(system, xp.where(grown, reason, int(Failure.NONE)), end.size > target)
        # Growing components grow by |1 − ηλ| = ηλ − 1. They dominate A t sooner than t itself, which keeps
        # its components without curvature.
        growing = xp.where(grown, (1 + end.growth) / eta, zero)
        return Solution(end.x, end.k, end.k + spent, failure, xp.maximum(end.curvature, growing))

    def _product(self, system: System) -> Callable[[Tree, Any], Tree]:
        if not self.fresh:
            return lambda p, k: system.product(p)
        if system.resampled is None:
            raise ArgumentError(
                "Neumann: fresh=True needs products on other batches, and this system has none"
            )
        return system.resampled


def _largest_eigenvalue(system: System, product: Callable[[Tree, Any], Tree]) -> Scalar:
    """Estimate the largest |eigenvalue| of A by power iterations from v, plus a tenth for safety."""
    backend, xp = system.backend, system.backend.xp

    def unit(x: Tree) -> tuple[Tree, Scalar]:
        size = vectors.norm(backend, x)
        return vectors.scale(backend, 1.0 / xp.where(size > 0, size, xp.ones_like(size)), x), size

    def body(carry: tuple[Tree, Scalar], k: Any, _: Any) -> tuple[tuple[Tree, Scalar], None]:
        return unit(product(carry[0], k)), None

    (_, size), _ = backend.scan(body, unit(system.v), _POWER_STEPS)
    return 1.1 * xp.where(size > 0, size, xp.ones_like(size))
