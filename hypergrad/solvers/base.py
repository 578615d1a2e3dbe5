"""What a linear system is, what solves it, and how a solution is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure

Product = Callable[[Tree, Any], Tree]
"""(p, k) -> A p, where k counts the products of this solve before."""


class System(NamedTuple):
    """A x = v, of which a solver sees products alone, and where it begins: x, and r = v − A x there.

    ``definite`` says that a symmetric A should be so, and negative curvature a fault. ``goal`` is the
    ‖Ax − v‖ to reach, where that is not the solver's own to say, and ``direction`` the search direction in
    which a solve goes on that was interrupted, zeros if it was not. ``met`` is a first estimate of ‖A‖ from
    below, 0 if there is none: near a solution r alone may not show of what size A is.
    """

    product: Product
    v: Tree
    x: Tree
    r: Tree
    symmetric: bool = True
    definite: bool = True
    goal: Scalar | None = None
    direction: Tree | None = None
    met: Scalar = 0.0

    @classmethod
    def at_rest(
        cls, backend: Backend, product: Product, v: Tree, symmetric: bool = True, definite: bool = True
    ) -> System:
        """From x = 0, where the residual costs nothing."""
        return cls(product, v, backend.zeros(v), v, symmetric, definite)

    @classmethod
    def begun(
        cls,
        backend: Backend,
        product: Product,
        v: Tree,
        x: Tree,
        symmetric: bool = True,
        definite: bool = True,
    ) -> System:
        """From an x that is near the solution: one product. Where v = 0 the solution is 0, whatever x is."""
        one = backend.xp.ones_like(vectors.norm(backend, v))
        x = vectors.scale(backend, backend.xp.where(vectors.norm(backend, v) > 0, one, 0.0 * one), x)
        ax, size = product(x, 0), vectors.norm(backend, x)
        met = vectors.norm(backend, ax) / backend.xp.where(size > 0, size, one)
        return cls(product, v, x, vectors.subtract(backend, v, ax), symmetric, definite, met=met)


class Solution(NamedTuple):
    """What a solver found, and what it saw on the way.

    ``curvature`` is its estimate of the largest |eigenvalue| of A, NaN if it made none; 2 / curvature is the
    largest stable step of gradient descent. ``smallest`` is the smallest curvature that it met, |pᵀAp|/pᵀp or
    ‖Ap‖/‖p‖, NaN if it looked for none: never below the smallest singular value of a definite A, so that A is
    ill-conditioned by curvature / smallest at least. ``failure`` is a code of `Failure`. ``residual`` is the
    true ‖Ax − v‖/‖v‖, measured by whoever asked for the solution, and never by the solver. ``direction`` is
    where the solver would go next, if that helps it to go on.
    """

    x: Tree
    iterations: Any
    products: Any
    failure: Any = Failure.NONE
    curvature: Scalar = float("nan")
    smallest: Scalar = float("nan")
    residual: Scalar = float("nan")
    direction: Tree = ()


class Solver(ABC):
    """An approximation of x = A⁻¹ v from products with A alone.

    ``rtol`` and ``atol`` promise ‖Ax − v‖ ≤ max(rtol ‖v‖, atol); a solver with ``rtol = None`` is a
    truncation that promises nothing. One that ``needs_symmetry`` is given no other system.
    """

    needs_symmetry: ClassVar[bool] = False
    rtol: float | None = None
    atol: float = 0.0

    @property
    def promises_nothing(self) -> bool:
        """Is its x taken as it comes, whatever the residual?"""
        return self.rtol is None and self.atol == 0

    @property
    def truncates(self) -> bool:
        """Is it a few steps towards A⁻¹v, with a derivative of their own, and not A⁻¹v itself?"""
        return self.promises_nothing

    @abstractmethod
    def solve(self, backend: Backend, system: System) -> Solution:
        """Solve A x = v from where the system begins."""

    def target(self, backend: Backend, system: System) -> Scalar:
        """The largest ‖Ax − v‖ that counts as success; 0 if nothing is promised."""
        if system.goal is not None:
            return system.goal
        size = vectors.norm(backend, system.v)
        return backend.xp.maximum((self.rtol or 0.0) * size, self.atol + 0.0 * size)

    def prepared(self, backend: Backend, system: System) -> tuple[Solver, Any]:
        """This solver, having looked at the system once for several solves, and the products that took."""
        return self, 0

    def remembered(self, backend: Backend, x: Tree, r: Tree) -> Tree:
        """Where the next solve begins if it begins warm, from this x and its residual."""
        return x


class Preconditioner(ABC):
    """An approximate inverse M ≈ A⁻¹, positive definite, that is cheap to apply."""

    @abstractmethod
    def prepare(self, backend: Backend, system: System) -> Prepared:
        """Look at the system once."""


class Prepared(NamedTuple):
    """p ↦ M p, the products that it took to make it, and what was seen of A meanwhile."""

    apply: Callable[[Tree], Tree]
    products: Any = 0
    failure: Any = Failure.NONE
    curvature: Scalar = float("nan")


class ApproximateInverse(Preconditioner, Solver):
    """A preconditioner that may also stand for the inverse itself: x ← x + M r."""

    def solve(self, backend: Backend, system: System) -> Solution:
        made = self.prepare(backend, system)
        x = vectors.add(backend, system.x, made.apply(system.r))
        return Solution(x, 1, made.products, made.failure, made.curvature)


def prepare(preconditioner: Any, backend: Backend, system: System) -> Prepared:
    """A preconditioner, a function of trees or ``None``, made ready for one system."""
    if preconditioner is None:
        return Prepared(lambda p: p)
    if isinstance(preconditioner, Preconditioner):
        return preconditioner.prepare(backend, system)
    return Prepared(preconditioner)


def check_steps(solver: str, max_steps: int, name: str = "max_steps") -> None:
    """Check a number of iterations.

    Raises:
        ArgumentError: if it is not a positive integer.
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ArgumentError(f"{solver}: {name} = {max_steps!r}; it is a positive integer")


def check_tolerance(solver: str, rtol: float | None, atol: float = 0.0) -> None:
    """Check a relative and an absolute tolerance.

    Raises:
        ArgumentError: if the first is not in (0, 1), or the second is negative.
    """
    if rtol is not None and not (is_number(rtol) and 0 < rtol < 1):
        raise ArgumentError(f"{solver}: rtol = {rtol!r}; it is a number between 0 and 1")
    check_size(solver, "atol", atol)


def check_size(solver: str, name: str, value: float) -> None:
    """Check a number that is not negative.

    Raises:
        ArgumentError: if it is.
    """
    if not (is_number(value) and 0 <= value < float("inf")):
        raise ArgumentError(f"{solver}: {name} = {value!r}; it is a number ≥ 0")


def check_positive(solver: str, name: str, value: Any) -> None:
    """Check a step or a scale.

    Raises:
        ArgumentError: if it is no positive number.
    """
    if not (is_number(value) and 0 < value < float("inf")):
        raise ArgumentError(f"{solver}: {name} = {value!r}; it is a positive number")


def check_preconditioner(solver: str, preconditioner: Any) -> None:
    """Check that something can precondition.

    Raises:
        ArgumentError: if it is neither a `Preconditioner`, nor a function, nor ``None``.
    """
    known = preconditioner is None or isinstance(preconditioner, Preconditioner)
    if not known and (isinstance(preconditioner, Solver) or not callable(preconditioner)):
        raise ArgumentError(
            f"{solver}: preconditioner = {preconditioner!r}; it is hg.Nystrom(…), hg.Diagonal(…), or a "
            "function p -> M p of trees"
        )


def rounding(backend: Backend, like: Scalar) -> float:
    """The unit of rounding in which a solve's numbers are computed."""
    return float(backend.xp.finfo(like.dtype).eps)


def relative(backend: Backend, r: Tree, v: Tree) -> Scalar:
    """‖r‖/‖v‖, and ‖r‖ where v = 0."""
    xp, size = backend.xp, vectors.norm(backend, v)
    return vectors.norm(backend, r) / xp.where(size > 0, size, xp.ones_like(size))


def met(backend: Backend, smallest: Scalar) -> Scalar:
    """A running minimum that began at ∞: NaN if nothing came."""
    return backend.xp.where(backend.xp.isfinite(smallest), smallest, float("nan"))
