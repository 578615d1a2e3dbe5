"""A linear system as a solver sees it, and what a solver returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import Failure


class Image(NamedTuple):
    """The results of one pull-back along x.

    ``ax`` is A x, and ``mixed`` is B x, the product that the hypergradient needs. ``error`` is the estimated
    relative error of ``mixed`` if it was computed by finite differences.
    """

    ax: Tree
    mixed: Tree = None
    error: Scalar | None = None


class Trials(NamedTuple):
    """Earlier solves of the same system with other shifts: how the last one ended, and the cost of all."""

    failure: Any
    smallest: Scalar
    products: Any
    iterations: Any


@final
@dataclass(frozen=True)
class System:
    """The system A x = v. A solver can use A only through products, p -> A p.

    ``x`` is the start, by default 0, and ``r`` is v − A x, which is measured if it is not given. ``definite``
    means that a symmetric A should be positive definite, so that negative curvature is a failure.

    ``shift`` is the δ that ``product`` already includes, ``None`` before a solver has prepared the system.
    ``both`` is x -> `Image`, if there is a B; the hypergradient is then c − B x with c in ``direct``.
    ``resampled`` is (p, k) -> A_k p, where each A_k belongs to another batch.

    The other fields are for a solve that resumes an earlier one: ``goal`` is the ‖A x − v‖ to reach, in place
    of the solver's own target; ``direction`` the search direction to resume with, zeros if there is none;
    ``curvature`` an estimate of ‖A‖ from below, 0 if there is none (near a solution r alone may not show how
    large A is); ``spent`` the products taken so far; and ``trials`` the solves with other shifts. ``scale``
    is what the given v has been multiplied by.
    """

    backend: Backend
    product: Callable[[Tree], Tree]
    v: Tree
    symmetric: bool = True
    definite: bool = True
    x: Tree | None = None
    r: Tree | None = None
    shift: Scalar | None = None
    both: Callable[[Tree], Image] | None = None
    direct: Tree | None = None
    resampled: Callable[[Tree, Any], Tree] | None = None
    goal: Scalar | None = None
    direction: Tree | None = None
    curvature: Scalar = 0.0
    spent: Any = 0
    trials: Trials | None = None
    scale: Scalar = 1.0

    def balanced(self) -> System:
        """Return the system with v, x and c multiplied by 1/max|v_i|, if ‖v‖² or ‖r‖² could leave the range.

        Solvers compute inner products, whose squares underflow or overflow long before the numbers do: in
        float32 at 1e-19 and 1e19. x is linear in v, so that `restored` makes up for it. Costs one norm, where
        that can be read and is in the range.
        """
        backend, xp, v = self.backend, self.backend.xp, self.backend.detach(self.v)
        with np.errstate(over="ignore"):  # which is what the scale is for
            size = vectors.norm(backend, v)
        limits = xp.finfo(size.dtype)
        smallest = min(float(limits.tiny) ** 0.5 / float(limits.eps), 0.25)
        if (known := backend.number(size)) is not None and smallest <= known <= 1 / smallest:
            return self
        largest = 0.0 * xp.ones_like(size)
        for leaf in backend.flatten(v)[0]:
            if backend.describe(leaf).nbytes:
                largest = xp.maximum(largest, xp.max(xp.abs(leaf)))
        # Neither 1/max|v_i| nor its own reciprocal may leave the range.
        low, high = (xp.ones_like(size) * x for x in (4 * float(limits.tiny), 0.25 / float(limits.tiny)))
        inside = (size >= smallest) & (size <= 1 / smallest) | (largest == 0) | ~xp.isfinite(largest)
        divisor = xp.maximum(xp.minimum(largest, high), low)
        scale = xp.where(inside, xp.ones_like(size), 1.0 / divisor)

        moved = replace(self, scale=scale)
        v, x, direct = (
            tree if tree is None else moved.scaled(tree) for tree in (self.v, self.x, self.direct)
        )
        return replace(moved, v=v, x=x, direct=direct)

    def restored(self, x: Tree) -> Tree:
        """Return a tree that is linear in v, such as x, as it is for the given v: divided by the scale."""
        return x if self.unscaled else vectors.scale(self.backend, 1.0 / self.scale, x)

    def scaled(self, x: Tree) -> Tree:
        """Return a tree that belongs to the given v multiplied by the scale."""
        return x if self.unscaled else vectors.scale(self.backend, self.scale, x)

    @property
    def unscaled(self) -> bool:
        """Is the scale the number 1?"""
        return isinstance(self.scale, float) and self.scale == 1.0

    def begun(self) -> System:
        """Return the system with x and r. Costs one product if a start x was given.

        Where v = 0 the solution is 0, and x starts there.
        """
        if self.r is not None:
            return self
        backend, v, xp = self.backend, self.v, self.backend.xp
        if self.x is None:
            return replace(self, x=backend.zeros(v), r=v)
        size = vectors.norm(backend, v)
        one = xp.ones_like(size)
        x = vectors.scale(backend, xp.where(size > 0, one, 0.0 * one), self.x)
        ax, length = self.product(x), vectors.norm(backend, x)
        curvature = vectors.norm(backend, ax) / xp.where(length > 0, length, one)
        r = vectors.subtract(backend, v, ax)
        return replace(self, x=x, r=r, curvature=curvature, spent=self.spent + 1)

    def shifted(self, delta: Scalar) -> System:
        """Return the system (A + δI) x = v, with the same products if δ is the number 0."""
        if isinstance(delta, int | float) and delta == 0:
            return replace(self, shift=delta)
        axpy, product, both, resampled = self.backend.axpy, self.product, self.both, self.resampled

        def image(x: Tree) -> Image:
            assert both is not None
            at = both(x)
            return at._replace(ax=axpy(delta, x, at.ax))

        def fresh(p: Tree, k: Any) -> Tree:
            assert resampled is not None
            return axpy(delta, p, resampled(p, k))

        return replace(
            self,
            product=lambda p: axpy(delta, p, product(p)),
            both=both and image,
            resampled=resampled and fresh,
            r=None if self.r is None else axpy(-delta, self.x, self.r),
            shift=delta,
        )

    def constant(self) -> System:
        """Return the same system, detached from all derivatives."""
        detach, product, both = self.backend.detach, self.product, self.both

        def image(x: Tree) -> Image:
            assert both is not None
            return Image(*detach(tuple(both(x))))

        return replace(
            self,
            product=lambda p: detach(product(p)),
            both=both and image,
            v=detach(self.v),
            direct=detach(self.direct),
        )

    def image(self, x: Tree) -> Image:
        """Return A x, and B x if there is a B."""
        return Image(self.product(x)) if self.both is None else self.both(x)


class Solution(NamedTuple):
    """The result of a solve, and what the solver measured."""

    x: Tree
    iterations: Any
    products: Any
    failure: Any = int(Failure.NONE)
    """A code of `Failure`."""
    curvature: Scalar = float("nan")
    """Estimate of the largest |eigenvalue| of A, NaN if there is none.

    2 / curvature is the largest stable step of gradient descent."""
    smallest: Scalar = float("nan")
    """The smallest curvature of any direction p, |pᵀAp|/pᵀp or ‖Ap‖/‖p‖, NaN if the solver measured none.

    It is never below the smallest singular value of a definite A, so that the condition number of A is at
    least curvature / smallest."""
    residual: Scalar = float("nan")
    """The true ‖Ax − v‖/‖v‖, measured by the caller of the solver, and never by the solver."""
    shift: Scalar = 0.0
    """δ, if (A + δI) x = v was solved."""
    error: Scalar | None = None
    """Estimated relative error of c − B x, from a solve by `UntilAccurate`."""
    direction: Tree | None = None
    """The search direction with which the solver can resume, if it uses one."""
    memory: Tree | None = None
    """The memory for the next solve."""
    image: Image | None = None
    """A x and B x, if the solver has computed them: they need not be computed again."""
