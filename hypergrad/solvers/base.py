"""The interface of solvers and preconditioners, and checks of their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.system import Solution, System


class Solver(ABC):
    """A solver that approximates x = A⁻¹ v from products with A alone.

    To write one, implement `solve`. It works on constants; its caller (`hypergrad.solvers.solve`) takes the
    derivatives of the solution and measures its residual.

    ``rtol`` and ``atol`` promise ‖Ax − v‖ ≤ max(rtol ‖v‖, atol). A solver with ``rtol = None`` is a
    truncation: it takes ``max_steps`` products and promises nothing.
    """

    has_residual: ClassVar[bool] = False
    """Does it know its own residual, so that only rounding can have it miss a target that it reports?"""

    rtol: float | None = None
    atol: float = 0.0

    @property
    def needs_symmetry(self) -> bool:
        """Does it need a symmetric A?"""
        return False

    @property
    def promises_nothing(self) -> bool:
        """Is its x accepted whatever the residual?"""
        return self.rtol is None and self.atol == 0

    @property
    def truncates(self) -> bool:
        """Does it stop after a few iterations towards A⁻¹v? Then derivatives go through these iterations."""
        return self.promises_nothing

    @property
    def differentiable(self) -> bool:
        """Does its solution have derivatives?"""
        return True

    @property
    def resamples(self) -> bool:
        """Does it use another batch for each product?"""
        return False

    @property
    def core(self) -> Solver:
        """The solver itself, without its wrappers."""
        return self

    def init(self, backend: Backend, v: Tree) -> Tree | None:
        """Return the memory for the first solve, for right-hand sides like v; ``None`` for no memory."""
        return None

    def prepared(self, system: System, memory: Tree | None) -> System:
        """Return the system to solve, with a shift and a start if this solver uses them.

        Called once, before `solve`, with a system of constants.
        """
        return system.shifted(0.0)

    def for_one_system(self, system: System) -> tuple[Solver, Any]:
        """Return a solver for several solves of one system, and the products spent on preparing it."""
        return self, 0

    @abstractmethod
    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        """Solve A x = v, starting from the system's x.

        Args:
            system: the system to solve; ``system.begun()`` has x and r.
            memory: from `init`, or the memory of the last solution.
        """

    def finished(self, system: System, solution: Solution) -> Solution:
        """Complete the solution of a system that this solver prepared and another one solved."""
        return solution

    def diagnosed(self, system: System, failure: Any) -> Any:
        """Return the failure of a solve of this system, or one that says more, where one can be found.

        Called with the final failure, after the true residual was measured.
        """
        return failure

    def target(self, system: System) -> Scalar:
        """Return the largest ‖Ax − v‖ that counts as success; v's rounding error if nothing is promised."""
        if system.goal is not None:
            return system.goal
        size = vectors.norm(system.backend, system.v)
        if self.promises_nothing:
            return rounding(system.backend, size) * size
        return system.backend.xp.maximum((self.rtol or 0.0) * size, self.atol * system.scale + 0.0 * size)


class Iterative(Solver):
    """A solver that iterates until its residual is small, or for a given number of products."""

    has_residual: ClassVar[bool] = True

    max_steps: int | None
    fewest: ClassVar[int] = 1

    def limit(self, system: System) -> int:
        """Return the most products: ``max_steps``, by default 2n for n unknowns, from ``fewest`` to 1000."""
        return self.max_steps or min(max(2 * vectors.size(system.backend, system.v), self.fewest), 1000)

    def iterate(
        self, system: System, going: Callable[[Any], Any], body: Callable[[Any], Any], start: Any, limit: int
    ) -> Any:
        """Repeat ``body`` while ``going``. A truncation runs in a `scan`, which every framework can
        differentiate in reverse mode.
        """
        backend = system.backend
        if not (self.promises_nothing and system.goal is None):
            return backend.while_loop(going, body, start, limit)

        def step(it: Any, k: Any, _: Any) -> tuple[Any, None]:
            return backend.cond(going(it), lambda: body(it), lambda: it), None

        return backend.scan(step, start, limit)[0]

    def final_failure(self, system: System, failure: Any, missed: Any) -> Any:
        """Return the failure, or ``MAX_STEPS`` if there was none and the solve ``missed`` its target."""
        if self.promises_nothing and system.goal is None:
            return failure
        where = system.backend.xp.where
        return where((failure == Failure.NONE) & missed, int(Failure.MAX_STEPS), failure)


@dataclass(frozen=True)
class Krylov(Iterative):
    """A method over the Krylov space of v, which stops when its residual is small.

    Args:
        max_steps: the most products; by default 2n for n unknowns, between 100 and 1000.
        rtol: the relative residual ‖Ax − v‖/‖v‖ to reach; ``None`` takes ``max_steps`` products and promises
            nothing.
        atol: the absolute residual ‖Ax − v‖ to reach; meeting ``rtol`` or ``atol`` is enough.

    Raises:
        ArgumentError: for numbers out of range.
    """

    fewest: ClassVar[int] = 100

    max_steps: int | None = None
    rtol: float | None = 1e-6
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_count(type(self).__name__, "max_steps", self.max_steps, optional=True)
        check_tolerance(type(self).__name__, self.rtol, self.atol)


class Preconditioner(ABC):
    """An approximate inverse M ≈ A⁻¹, positive definite, that is cheap to apply."""

    @abstractmethod
    def prepare(self, system: System) -> Prepared:
        """Compute M for this system."""


class Prepared(NamedTuple):
    """A preconditioner p ↦ M p of one system, the products spent on it, and what they showed of A."""

    apply: Callable[[Tree], Tree]
    products: Any = 0
    failure: Any = int(Failure.NONE)
    curvature: Scalar = float("nan")


class ApproximateInverse(Preconditioner, Solver):
    """A preconditioner that can also be used as a solver: x ← x + M r."""

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system, inverse = system.begun(), self.prepare(system)
        x = vectors.add(system.backend, system.x, inverse.apply(system.r))
        return Solution(x, 1, inverse.products + system.spent, inverse.failure, inverse.curvature)


def prepare(preconditioner: Any, system: System) -> Prepared:
    """Prepare a preconditioner, a function of trees or ``None``, for one system."""
    if preconditioner is None:
        return Prepared(lambda p: p)
    if isinstance(preconditioner, Preconditioner):
        return preconditioner.prepare(system)
    return Prepared(preconditioner)


def check_count(solver: str, name: str, count: int | None, optional: bool = False) -> None:
    """Check a count, such as a number of iterations.

    Raises:
        ArgumentError: if it is not a positive integer.
    """
    if count is None and optional:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(f"{solver}: {name} = {count!r}; it must be a positive integer")


def check_seed(solver: str, seed: int) -> None:
    """Check the seed of random draws.

    Raises:
        ArgumentError: if it is not an integer ≥ 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"{solver}: seed = {seed!r}; it must be an integer ≥ 0")


def check_tolerance(solver: str, rtol: float | None, atol: float = 0.0) -> None:
    """Check a relative and an absolute tolerance.

    Raises:
        ArgumentError: if the first is not in (0, 1), or the second is negative.
    """
    if rtol is not None and not (is_number(rtol) and 0 < rtol < 1):
        raise ArgumentError(
            f"{solver}: rtol = {rtol!r}; it must be a number between 0 and 1, or None: then the "
            "solver runs all of its iterations and promises nothing"
        )
    check_size(solver, "atol", atol)


def check_size(solver: str, name: str, value: float) -> None:
    """Check that a number is finite and not negative.

    Raises:
        ArgumentError: if it is not.
    """
    if not (is_number(value) and 0 <= value < float("inf")):
        raise ArgumentError(f"{solver}: {name} = {value!r}; it must be a number ≥ 0")


def check_positive(solver: str, name: str, value: Any) -> None:
    """Check that a step or a scale is a finite positive number.

    Raises:
        ArgumentError: if it is not.
    """
    if not (is_number(value) and 0 < value < float("inf")):
        raise ArgumentError(f"{solver}: {name} = {value!r}; it must be a positive number")


def check_preconditioner(solver: str, preconditioner: Any) -> None:
    """Check that an argument is a preconditioner.

    Raises:
        ArgumentError: if it is neither a `Preconditioner`, nor a function, nor ``None``.
    """
    valid = preconditioner is None or isinstance(preconditioner, Preconditioner)
    if not valid and (isinstance(preconditioner, Solver) or not callable(preconditioner)):
        raise ArgumentError(
            f"{solver}: preconditioner = {preconditioner!r}; it must be hg.Nystrom(…), hg.Diagonal(…), or a "
            "function p -> M p of trees"
        )


def rounding(backend: Backend, like: Scalar) -> float:
    """Return the machine epsilon of a solve's scalars."""
    return float(backend.xp.finfo(like.dtype).eps)


def relative_norm(backend: Backend, r: Tree, v: Tree) -> Scalar:
    """Return ‖r‖/‖v‖, or ‖r‖ where v = 0."""
    xp, size = backend.xp, vectors.norm(backend, v)
    return vectors.norm(backend, r) / xp.where(size > 0, size, xp.ones_like(size))


def nan_if_infinite(backend: Backend, smallest: Scalar) -> Scalar:
    """Return a running minimum that started at ∞, or NaN if it was never lowered."""
    return backend.xp.where(backend.xp.isfinite(smallest), smallest, float("nan"))
