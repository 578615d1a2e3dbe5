"""A linear system as a solver sees it, and what a solver returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import Failure


class Image(NamedTuple):
    """What one pull-back along x gives.

    ``ax`` is A x, and ``mixed`` is B x, for whose sake x is looked for. ``error`` is the estimated relative
    error of the latter if it was taken by differences.
    """

    ax: Tree
    mixed: Tree = None
    error: Scalar | None = None


class Trials(NamedTuple):
    """Solves of the same system before this one, with other shifts: how the last one ended, and their
    cost.
    """

    failure: Any
    smallest: Scalar
    products: Any
    iterations: Any


@final
@dataclass(frozen=True)
class System:
    """A x = v. A solver sees no more of A than products, p -> A p.

    Where it begins is x, by default 0, and r = v − A x, which is measured if it is not given. ``definite``
    says that a symmetric A should be positive definite, so that negative curvature is a failure.

    ``shift`` is the δ that ``product`` has in it already, ``None`` before a solver has prepared the system.
    ``both`` is x -> `Image`, if x is looked for to find B x; what is wanted in the end is then c − B x with c
    in ``direct``. ``resampled`` is (p, k) -> A_k p, where each A_k is of another batch.

    The rest is for a solve that goes on where another one stopped: ``goal`` is the ‖A x − v‖ to reach,
    where that is not the solver's own to say, ``direction`` the search direction to go on in, zeros if
    there is none, ``met`` an estimate of ‖A‖ from below, 0 if there is none (near a solution r alone may
    not show of what size A is), and ``spent`` the products that have been taken.
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
    met: Scalar = 0.0
    spent: Any = 0
    trials: Trials | None = None

    def begun(self) -> System:
        """The system with x and r: no product from x = 0, one from anywhere else.

        Where v = 0 the solution is 0, and x begins there.
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
        met = vectors.norm(backend, ax) / xp.where(length > 0, length, one)
        return replace(self, x=x, r=vectors.subtract(backend, v, ax), met=met, spent=self.spent + 1)

    def shifted(self, delta: Scalar) -> System:
        """(A + δI) x = v, for which nothing is done where δ is known to be 0."""
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
        """The same system, of which no derivative is taken."""
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
        """A x, and B x if there is a B."""
        return Image(self.product(x)) if self.both is None else self.both(x)


class Solution(NamedTuple):
    """What a solver found, and what it measured on the way."""

    x: Tree
    iterations: Any
    products: Any
    failure: Any = int(Failure.NONE)
    """A code of `Failure`."""
    curvature: Scalar = float("nan")
    """Estimate of the largest |eigenvalue| of A, NaN if there is none.

    2 / curvature is the largest stable step of gradient descent."""
    smallest: Scalar = float("nan")
    """The smallest curvature that was met, |pᵀAp|/pᵀp or ‖Ap‖/‖p‖, NaN if the solver did not look.

    It is never below the smallest singular value of a definite A, so that A is ill-conditioned by
    curvature / smallest at least."""
    residual: Scalar = float("nan")
    """The true ‖Ax − v‖/‖v‖, measured by whoever asked for the solution, and never by the solver."""
    shift: Scalar = 0.0
    """δ, if (A + δI) x = v was solved."""
    error: Scalar | None = None
    """Estimated relative error of c − B x, of a solve that was to reach one."""
    direction: Tree | None = None
    """The search direction in which the solver would go on, if that helps it to."""
    memory: Tree | None = None
    """What the next solve is given."""
    image: Image | None = None
    """A x and B x, if the solver has taken them: nobody has to take them again."""
