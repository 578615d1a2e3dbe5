"""Every error and warning of `hypergrad`.

A message states the fact, the consequence, the likely causes in order of likelihood, and the remedy
for each; it names leaves by their path, as in ``params['layers'][0]['w']``. None of these errors leaves
anything half done: estimates are pure, and the state of the random generator is restored.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import Any, Literal


class HypergradError(Exception):
    """Base class of every error that this library raises on purpose.

    Attributes:
        run: raised in `hypergrad.Tuner.run`, the `Run` up to the last update before the fault; else ``None``.
            Its state and history can be saved, and given to another run as ``resume``.
    """

    run: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as itself: with its message and attributes, whatever made the message."""
        return _revived, (type(self), self.args, dict(vars(self)))


def _revived(kind: type[HypergradError], args: tuple[Any, ...], attributes: dict[str, Any]) -> HypergradError:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class ArgumentError(HypergradError, ValueError):
    """An argument has the wrong value, shape or structure."""


class LeafTypeError(HypergradError, TypeError):
    """A leaf has a type, dtype, device or framework that cannot be differentiated here."""


class UnsupportedLeafError(HypergradError, NotImplementedError):
    """A leaf is of a kind that no estimator supports, such as a complex array."""


class UnsupportedOpError(HypergradError, NotImplementedError):
    """An operation inside a loss has no (second) derivative in its framework."""


def no_outer_derivative(what: str) -> UnsupportedOpError:
    """Return the error for differentiating a hypergradient whose states pass through integers or a file."""
    return UnsupportedOpError(
        f"{what} stores its states as integers or in a file, which have no derivative, so a derivative of "
        "its hypergradient would be wrong: use hg.Full or hg.States"
    )


class BackendError(HypergradError, LookupError):
    """No backend of that name is registered, or its framework is not installed."""


class MissingExtraError(HypergradError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class CheckpointError(HypergradError, ValueError):
    """A saved run is damaged, or belongs to another recipe, structure, backend or version of the format."""


class DamagedFileError(CheckpointError):
    """A saved file is not as it was written: it is damaged, or some other program wrote it."""


class TornStateError(HypergradError, RuntimeError):
    """A tuner was interrupted in the middle of a step, and its state is not whole."""


class DisconnectedError(HypergradError, ValueError):
    """A loss does not depend on a tree by which it is differentiated, as its graph shows.

    Attributes:
        path: the leaf or tree on which the loss does not depend, as in ``hparams['log_l2']``.
    """

    path: str

    def __init__(self, message: str, path: str) -> None:
        Exception.__init__(self, message)
        self.path = path


class NonFiniteError(HypergradError, ArithmeticError):
    """A loss or a derivative is NaN or infinite.

    Attributes:
        where: ``"T1"`` or ``"T2"``: the loss in which it appeared.
        step: the training step, counted from 0.
        path: the leaf, if the loss was finite but a derivative was not.
    """

    where: Literal["T1", "T2"]
    step: int
    path: str | None

    def __init__(self, where: Literal["T1", "T2"], step: int, path: str | None = None) -> None:
        if path is None:
            fact = f"the {where} loss is not finite at step {step}"
            causes: tuple[str, ...] = (
                "the training diverged: lower the learning rate",
                "a hyperparameter left the domain in which the loss is defined: give it a space",
                "the batch itself contains NaN or Inf",
                "an overflow in half precision: compute the loss and accumulate sums in float32",
            )
        else:
            fact = f"the {where} loss is finite at step {step}, but {path} has a non-finite derivative"
            causes = (
                "a square root, norm, power or logarithm was differentiated at zero: add a small constant",
                "an overflow in the backward pass: rescale the loss; in half precision accumulate in float32",
            )
        Exception.__init__(
            self, explain(fact, "No hypergradient was returned and nothing was changed.", causes)
        )
        self.where, self.step, self.path = where, step, path


class Failure(IntEnum):
    """Why a linear solve failed; the code that a compiled `Report` carries."""

    NONE = 0
    SINGULAR = 1
    NEGATIVE_CURVATURE = 2
    MAX_STEPS = 3
    DIVERGED = 4
    BREAKDOWN = 5
    STAGNATION = 6


class SolveError(HypergradError, ArithmeticError):
    """The inverse-Hessian solve of `Implicit` failed.

    Attributes:
        reason: ``"singular"``, ``"negative_curvature"``, ``"max_steps"``, ``"diverged"``, ``"breakdown"``
            or ``"stagnation"`` (rounding keeps the residual above the tolerance).
        step: how many products had been computed.
        residual: the true relative residual ‖Hx − v‖/‖v‖.
    """

    reason: str
    step: int
    residual: float

    def __init__(self, message: str, reason: Failure, step: int, residual: float) -> None:
        Exception.__init__(self, message)
        self.reason, self.step, self.residual = reason.name.lower(), step, residual


class ReplayError(HypergradError, RuntimeError):
    """Training steps gave a different result when they were replayed.

    Attributes:
        step: the first step whose replay differed, if every step was compared; else ``None``.
    """

    step: int | None

    def __init__(self, fact: str, step: int | None = None) -> None:
        message = explain(
            fact,
            "The hypergradient would be that of another training run.",
            (
                "a function of batches returns another batch when it is called again with the same step: "
                "make it depend on the step alone",
                "a batch was changed in place after its step, by the loader or by the loss: pass copies",
                "a loss draws from its own random generator: use the framework's, or put the draws into the "
                "batch",
                "a loss reads something that has changed since: pass it in the batch",
            ),
        )
        Exception.__init__(self, message)
        self.step = step


class FixedPointError(HypergradError, ArithmeticError):
    """A number overflowed fixed point, or training run backwards did not recover its initial state.

    Attributes:
        path: the leaf whose parameters or velocity overflowed; ``None`` if none did.
    """

    path: str | None

    def __init__(self, path: str | None, log: bool = False) -> None:
        instead = "if nothing else helps: use hg.Binomial or hg.States"
        if path is not None:
            fact = f"{path} or its velocity overflowed the fixed point of hg.Reversible"
            causes: tuple[str, ...] = (
                "the training diverges: lower the learning rate",
                "its numbers are large: keep fewer bits after the point, hg.Reversible(fraction=…)",
                instead,
            )
        elif log:
            fact = "the log of hg.Reversible is full"
            causes = (
                "a momentum below ½ drops more than one bit a step, and a compiled program reserves one: "
                "set log_bits=",
                instead,
            )
        else:
            fact = "hg.Reversible ran training backwards and did not recover the initial state bit for bit"
            causes = (
                "a gradient is not the same when it is recomputed, because kernels are not deterministic, "
                "the loss has its own random generator, or a batch changed: use hg.Binomial or hg.States",
            )
        Exception.__init__(self, explain(fact, "The hypergradient would be wrong.", causes))
        self.path = path


class DifferenceError(HypergradError, ArithmeticError):
    """A second-order product by finite differences was not accurate enough.

    Attributes:
        error: its estimated relative error.
        tolerance: the largest error that is accepted.
    """

    error: float
    tolerance: float

    def __init__(self, error: float, tolerance: float) -> None:
        message = explain(
            f"finite differences of the training gradient disagree by {error:.1e} > {tolerance:.1e} between "
            "two radii",
            "The hypergradient would carry an error of that order, or be plainly wrong.",
            (
                "the loss has kinks (ReLU, max pooling), across which its gradient jumps: use "
                "hg.Exact(), or smooth activations",
                "rounding: use float64, or a larger FiniteDifference(radius=...)",
                "the loss curves strongly: use a smaller radius",
                "accept the error knowingly with FiniteDifference(tolerance=float('inf'))",
            ),
        )
        Exception.__init__(self, message)
        self.error, self.tolerance = error, tolerance


class InnerNotConvergedError(HypergradError, ArithmeticError):
    """An implicit estimate was requested away from the inner optimum, with ``Checks(away="raise")``.

    `hypergrad.check_hypergradient` raises it where Newton's method does not solve the inner problem.

    Attributes:
        gradient_norm: ‖∇C̃1‖ at the parameters given.
        tolerance: the norm up to which they count as an optimum.
    """

    gradient_norm: float
    tolerance: float

    def __init__(self, gradient_norm: float, tolerance: float) -> None:
        Exception.__init__(self, not_converged(gradient_norm, tolerance))
        self.gradient_norm, self.tolerance = gradient_norm, tolerance


class HypergradWarning(UserWarning):
    """Base class of every warning that this library gives."""


class BackendWarning(HypergradWarning):
    """The backend of an imported framework cannot be loaded, and its arrays are not recognised."""


class CheckpointWarning(HypergradWarning):
    """A damaged checkpoint was passed over, and an older one was read."""


class InnerNotConvergedWarning(HypergradWarning):
    """An implicit estimate was made away from the inner optimum."""


class SolveWarning(HypergradWarning):
    """A linear solve failed and its bias was accepted with ``Checks(unsolved="warn")``."""


class ZeroResponseWarning(HypergradWarning):
    """A hyperparameter acts through training, and its response is exactly 0 by the graph.

    C̃1 depends on it and ∇C̃1 does not, or C2 does not depend on the parameters.
    """


_INSIDE = {
    *("hypergrad", "hypergrad_numpy", "hypergrad_torch", "hypergrad_jax"),
    *("autograd", "contextlib", "functools", "jax", "optree", "torch"),
}
"""Packages between the user's line and a warning."""


_GIVEN: ContextVar[set[Any] | None] = ContextVar("warnings given", default=None)


@contextmanager
def each_warning_once(given: set[Any]) -> Iterator[None]:
    """Within this block give no warning whose kind is in ``given``, and add the kind of each to it."""
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def warn(message: str, category: type[HypergradWarning], about: str = "") -> None:
    """Give a warning that points at the user's line: the last one outside of this library.

    Category and ``about``, such as a path, make up its kind: see `each_warning_once`.
    """
    given = _GIVEN.get()
    if given is not None and (category, about) in given:
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
    if given is not None:
        given.add((category, about))


def explain(fact: str, consequence: str, causes: Sequence[str]) -> str:
    """Compose a message: the fact, what follows from it, and the causes, each with its remedy."""
    listed = ";\n".join(f"  ({letter}) {cause}" for letter, cause in zip("abcdefgh", causes, strict=False))
    return f"{fact}.\n  {consequence}" + (f" Likely causes:\n{listed}." if causes else "")


def not_converged(gradient_norm: float, tolerance: float) -> str:
    """Say that the implicit function theorem is being used away from an optimum."""
    return explain(
        f"the implicit hypergradient was taken where ‖∇C̃1‖ = {gradient_norm:.1e} > {tolerance:.1e} (for "
        "the fixed point of a map φ, the norm is ‖θ − φ(θ)‖)",
        "The implicit function theorem holds where this norm is 0; the error is of its order.",
        (
            "the inner problem is not solved: train longer, or use Unrolled",
            "the batch differs from the one that was trained on: pass all of T1",
            "the tolerance is too strict for this problem: raise Checks(tolerance=...)",
        ),
    )
