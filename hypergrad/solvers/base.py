"""What solves a linear system."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.system import Solution, System


class Solver(ABC):
    """An approximation of x = A⁻¹ v from products with A alone.

    To write one, implement `solve`. It works on constants: whoever asks for a solution takes its derivatives
    (`hypergrad.solvers.solve`), and measures its residual.

    ``rtol`` and ``atol`` promise ‖Ax − v‖ ≤ max(rtol ‖v‖, atol). A solver with ``rtol = None`` is a
    truncation: it takes ``max_steps`` products and promises nothing.
    """

    rtol: float | None = None
    atol: float = 0.0

    @property
    def needs_symmetry(self) -> bool:
        """Is it for symmetric systems alone?"""
        return False

    @property
    def promises_nothing(self) -> bool:
        """Is its x taken as it comes, whatever the residual?"""
        return self.rtol is None and self.atol == 0

    @property
    def truncates(self) -> bool:
        """Does it return a few steps towards A⁻¹v? Then derivatives go through these steps."""
        return self.promises_nothing

    @property
    def differentiable(self) -> bool:
        """Does its solution have derivatives?"""
        return True

    @property
    def resamples(self) -> bool:
        """Does it take the matrix of another batch for each product?"""
        return False

    @property
    def core(self) -> Solver:
        """The solver itself, without what is wrapped around it."""
        return self

    def init(self, backend: Backend, v: Tree) -> Tree | None:
        """What the first of several solves is given, for right-hand sides like v; ``None`` for no memory."""
        return None

    def prepared(self, system: System, memory: Tree | None) -> System:
        """The system as it is going to be solved, which may have a shift and a start.

        Called once, before `solve`, with a system of constants.
        """
        return system.shifted(0.0)

    def for_one_system(self, system: System) -> tuple[Solver, Any]:
        """This solver for several solves of one system, at which it looks once, and the products that
        took.
        """
        return self, 0

    @abstractmethod
    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        """Solve A x = v from where the system begins.

        Args:
            system: what is solved; ``system.begun()`` has x and r.
            memory: from `init`, or the memory of the last solution.
        """

    def finished(self, system: System, solution: Solution) -> Solution:
        """The solution of a system that this solver prepared and another one solved."""
        return solution

    def target(self, system: System) -> Scalar:
        """The largest ‖Ax − v‖ that counts as success; what rounding leaves of v if nothing is promised."""
        if system.goal is not None:
            return system.goal
        size = vectors.norm(system.backend, system.v)
        if self.promises_nothing:
            return rounding(system.backend, size) * size
        return system.backend.xp.maximum((self.rtol or 0.0) * size, self.atol + 0.0 * size)


class Iterative(Solver):
    """A solver that steps towards A⁻¹v until its residual is small, or for a given number of products."""

    max_steps: int | None
    fewest: ClassVar[int] = 1

    def limit(self, system: System) -> int:
        """Products at most: ``max_steps``, by default 2n for n unknowns, between ``fewest`` and 1000."""
        return self.max_steps or min(max(2 * vectors.size(system.backend, system.v), self.fewest), 1000)

    def iterate(
        self, system: System, going: Callable[[Any], Any], body: Callable[[Any], Any], start: Any, limit: int
    ) -> Any:
        """Run the body while it is going. A truncation runs in a `scan`, which has a reverse mode
        everywhere.
        """
        backend = system.backend
        if not (self.promises_nothing and system.goal is None):
            return backend.while_loop(going, body, start, limit)

        def step(it: Any, k: Any, _: Any) -> tuple[Any, None]:
            return backend.cond(going(it), lambda: body(it), lambda: it), None

        return backend.scan(step, start, limit)[0]

    def ended(self, system: System, failure: Any, missed: Any) -> Any:
        """The failure of a solve that ended with this one, and ``missed`` its target or did not."""
        if self.promises_nothing and system.goal is None:
            return failure
        where = system.backend.xp.where
        return where((failure == Failure.NONE) & missed, int(Failure.MAX_STEPS), failure)


class Preconditioner(ABC):
    """An approximate inverse M ≈ A⁻¹, positive definite, that is cheap to apply."""

    @abstractmethod
    def prepare(self, system: System) -> Prepared:
        """Look at the system once."""


class Prepared(NamedTuple):
    """p ↦ M p, the products that it took to make it, and what it showed of A."""

    apply: Callable[[Tree], Tree]
    products: Any = 0
    failure: Any = int(Failure.NONE)
    curvature: Scalar = float("nan")


class ApproximateInverse(Preconditioner, Solver):
    """A preconditioner that may also stand for the inverse itself: x ← x + M r."""

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system, made = system.begun(), self.prepare(system)
        x = vectors.add(system.backend, system.x, made.apply(system.r))
        return Solution(x, 1, made.products + system.spent, made.failure, made.curvature)


def prepare(preconditioner: Any, system: System) -> Prepared:
    """A preconditioner, a function of trees or ``None``, made ready for one system."""
    if preconditioner is None:
        return Prepared(lambda p: p)
    if isinstance(preconditioner, Preconditioner):
        return preconditioner.prepare(system)
    return Prepared(preconditioner)


def check_count(solver: str, name: str, count: int | None, optional: bool = False) -> None:
    """Check a number of iterations, or whatever else is counted.

    Raises:
        ArgumentError: if it is not a positive integer.
    """
    if count is None and optional:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(f"{solver}: {name} = {count!r}; it is a positive integer")


def check_tolerance(solver: str, rtol: float | None, atol: float = 0.0) -> None:
    """Check a relative and an absolute tolerance.

    Raises:
        ArgumentError: if the first is not in (0, 1), or the second is negative.
    """
    if rtol is not None and not (is_number(rtol) and 0 < rtol < 1):
        raise ArgumentError(
            f"{solver}: rtol = {rtol!r}; it is a number between 0 and 1, or None: then the solver takes "
            "all of its steps and promises nothing"
        )
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
