"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import Failure
from hypergrad.solvers.base import (
    Solution,
    Solver,
    System,
    check_positive,
    check_steps,
    check_tolerance,
    rounding,
)
from hypergrad.solvers.numbers import on_numbers

_POWER_STEPS = 10
_GROWING_TERMS = 3


class _Series(NamedTuple):
    x: Tree
    term: Tree
    size: Scalar
    stretch: Scalar
    growth: Scalar
    bent: Any
    grown: Any
    k: Any
    curvature: Scalar


@final
@dataclass(frozen=True)
class Neumann(Solver):
    r"""The truncated Neumann series (Lorraine et al. 2020, algorithm 3).

        x = η Σ_{k<K} (I − ηH)ᵏ v,    K: max_steps,  η: step_size

    At a fixed point of gradient descent with learning rate η, K terms give the hypergradient of the
    last K steps: `Unrolled(SGD(η), truncate=K)`. Without ``rtol`` the K terms are taken as they are,
    a bias that was asked for; with it, the series stops when ‖Hx − v‖/‖v‖ ≤ rtol or fails. K products.
    Three terms that grow one after the other are a divergence, found at once: either the step is too
    large, and the error names the largest stable one, or H has negative curvature, which is said where the
    last of them has it. For the fixed point of a
    map φ, where I − ∂φ stands for H and η is 1, these are K steps of the map, transposed.

    Args:
        max_steps: the number K of terms.
        step_size: η; if it is not given, 1 over the largest eigenvalue of H by ten power iterations, and 1
            for a system that is not symmetric.
        rtol: the relative residual to reach, if any.
    """

    max_steps: int = 20
    step_size: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        check_steps("Neumann", self.max_steps)
        check_tolerance("Neumann", self.rtol)
        if self.step_size is not None:
            check_positive("Neumann", "step_size", self.step_size)

    @on_numbers
    def solve(self, backend: Backend, system: System) -> Solution:
        xp, eta, spent = backend.xp, self.step_size, 0
        if eta is None and system.symmetric:
            eta, spent = 1.0 / largest_eigenvalue(backend, system), _POWER_STEPS
        elif eta is None:
            eta = 1.0
        size, target = vectors.norm(backend, system.r), self.target(backend, system)
        more, one, zero = 1 + 10 * rounding(backend, size), xp.ones_like(size), 0.0 * size

        # The remainder v − H x_k is the term (I − ηH)ᵏ v itself, so the residual costs no product.
        def going(s: _Series) -> Any:
            return (s.k < self.max_steps) & (s.size > target) & (s.grown < _GROWING_TERMS)

        def body(s: _Series) -> _Series:
            x, ht = backend.axpy(eta, s.term, s.x), system.product(s.term, spent + s.k)
            term = backend.axpy(-eta, ht, s.term)
            new, stretch = vectors.norm(backend, term), vectors.norm(backend, ht)
            return _Series(
                x,
                term,
                new,
                stretch,
                stretch / xp.where(s.stretch > 0, s.stretch, one),
                backend.inner(s.term, ht) < (1 - more) * stretch * s.size,
                xp.where(new > more * s.size, s.grown + 1, 0),
                s.k + 1,
                xp.maximum(s.curvature, stretch / s.size),
            )

        start = _Series(system.x, system.r, size, zero, zero, size < 0, 0, 0, zero + system.met)
        end = backend.while_loop(going, body, start, self.max_steps)
        short = (end.size > target) & (self.rtol is not None)
        grown = end.grown >= _GROWING_TERMS
        bent = xp.where(end.bent & system.symmetric, int(Failure.NEGATIVE_CURVATURE), int(Failure.DIVERGED))
        failure = xp.where(grown, bent, xp.where(short, int(Failure.MAX_STEPS), int(Failure.NONE)))
        # What grows, grows by |1 − ηλ| = ηλ − 1; in H t it stands out more than in t itself, where what
        # has no curvature stays as it is.
        growing = xp.where(grown, (1 + end.growth) / eta, zero)
        return Solution(end.x, end.k, end.k + spent, failure, xp.maximum(end.curvature, growing))


def largest_eigenvalue(backend: Backend, system: System) -> Scalar:
    """The largest |eigenvalue| of H by power iterations from v, a little too large for safety."""
    xp = backend.xp

    def unit(x: Tree) -> tuple[Tree, Scalar]:
        size = vectors.norm(backend, x)
        return vectors.scale(backend, 1.0 / xp.where(size > 0, size, xp.ones_like(size)), x), size

    def body(carry: tuple[Tree, Scalar], k: Any, _: Any) -> tuple[tuple[Tree, Scalar], None]:
        return unit(system.product(carry[0], k)), None

    (_, size), _ = backend.scan(body, unit(system.v), _POWER_STEPS)
    return 1.1 * xp.where(size > 0, size, xp.ones_like(size))
