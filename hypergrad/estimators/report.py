"""What an estimate assumed, and what was measured."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hypergrad.backend import Array, Scalar, Tree
from hypergrad.backend.shown import shown
from hypergrad.solvers import Solution


class Faults(NamedTuple):
    """Where a number first became non-finite; −1 means nowhere."""

    step: Any = -1
    """First training step with a T1 loss, gradient or update that is not finite."""
    leaf: Any = -1
    """The leaf of that gradient or update, −1 if the loss itself was not finite."""
    outer_leaf: Any = -1
    """First leaf of ∂_θ C2 that is not finite."""


class SolveReport(NamedTuple):
    """The outcome of a linear solve."""

    residual: Scalar
    """True relative residual ‖Ax − v‖/‖v‖, of the damped system if there is a shift."""
    iterations: Any
    products: Any
    failure: Any
    """A code of `hypergrad.errors.Failure`."""
    curvature: Scalar
    """The solver's estimate of the largest eigenvalue; NaN if it made none."""
    smallest_curvature: Scalar
    """Smallest curvature along the solver's directions: an upper estimate of the smallest eigenvalue. NaN if
    it was not measured."""
    shift: Scalar
    """δ, added to the matrix by `Damped` or `LevenbergMarquardt`."""
    error: Scalar | None
    """Estimated relative error of the hypergradient, for a solve by `UntilAccurate`."""

    @classmethod
    def of(cls, solution: Solution) -> SolveReport:
        """Return the report of a solution."""
        return cls(
            solution.residual,
            solution.iterations,
            solution.products,
            solution.failure,
            solution.curvature,
            solution.smallest,
            solution.shift,
            solution.error,
        )


class TapeReport(NamedTuple):
    """The outcome of the backward pass through a run."""

    fault: Any = -1
    """For the tape `Reversible`: the first leaf with a number that did not fit into fixed point; −2 if the
    reversed run did not end at its start, −3 if the log was full, −1 if there was no fault."""


COLUMNS = (
    "inner_gradient_norm", "direct_norm", "response_norm", "gradients", "products", "bytes_held",
    "solve.residual", "solve.iterations", "solve.failure", "solve.curvature",
)  # fmt: skip
"""The numbers that a history keeps of each report."""


class Report(NamedTuple):
    """What an estimate assumed and what was measured. Norms are Euclidean over all leaves.

    ``None`` means that a field does not apply. All others are arrays or numbers, so that a compiled estimate
    can return them; `HypergradientEstimator.check` turns the faults among them into errors.
    """

    inner_gradient_norm: Scalar
    """‖∇_θ C̃1‖ at the last point where it was computed; NaN if it never was."""
    direct_norm: Scalar
    """‖∂_λ C2‖, the direct term."""
    response_norm: Scalar
    """Norm of the response term, the part that reaches C2 through the parameters."""
    reached: Tree
    """For each hyperparameter: does the response term depend on it, by the graph? If not, it is exactly 0."""
    gradients: Scalar
    """First-order gradients spent, each of C̃1 or C2 on one batch."""
    products: Scalar
    """Second-order products spent; one costs about two gradients."""
    bytes_held: Any
    """Bytes of graphs or states kept for the backward pass."""
    faults: Faults = Faults()
    solve: SolveReport | None = None
    """Set by `Implicit`."""
    tape: TapeReport | None = None
    """Set by `Unrolled`."""
    inner_values: Array | None = None
    """C̃1 at each training step of the estimate, an array of shape (T,). Set by `Unrolled` and `Forward`."""
    difference_error: Scalar | None = None
    """Estimated relative error of a mixed term computed by `FiniteDifference`."""

    def columns(self) -> dict[str, Scalar]:
        """Return the numbers of `COLUMNS` by name, NaN for those that do not apply."""
        own = {name: getattr(self, name) for name in COLUMNS if "." not in name}
        for name in COLUMNS[len(own) :]:
            own[name] = float("nan") if self.solve is None else getattr(self.solve, name.partition(".")[2])
        return own

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> Report:
        """Return a report with the numbers that a history keeps, NaN and ``None`` for the others."""
        nan = float("nan")
        numbers = dict.fromkeys(SolveReport._fields, nan) | {
            name.partition(".")[2]: value for name, value in columns.items() if "." in name
        }
        own = {name: value for name, value in columns.items() if "." not in name}
        solve = None if np.isnan(numbers["failure"]) else SolveReport(**numbers)
        return cls(**own, reached=None, solve=solve)

    def __repr__(self) -> str:
        return shown(self)

    @property
    def cost(self) -> Scalar:
        """Cost in training gradients, a second-order product counting two."""
        return self.gradients + 2 * self.products
