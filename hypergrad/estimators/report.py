"""What an estimate assumed, and what was measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypergrad.backend import Scalar, Tree
from hypergrad.solvers import Solution


class Faults(NamedTuple):
    """Where a number stopped being finite; −1 stands for nowhere."""

    step: Any = -1
    """First training step with a T1 loss, gradient or update that is not finite."""
    leaf: Any = -1
    """The leaf of that gradient or update, −1 if the loss itself was not finite."""
    outer_leaf: Any = -1
    """First leaf of ∂_θ C2 that is not finite."""


class SolveReport(NamedTuple):
    """How a linear solve went."""

    residual: Scalar
    """True relative residual ‖Ax − v‖/‖v‖, of the damped system if there is a shift."""
    iterations: Any
    products: Any
    failure: Any
    """A code of `hypergrad.errors.Failure`."""
    curvature: Scalar
    """Largest eigenvalue that the solver met, by its own estimate; NaN if it made none."""
    smallest_curvature: Scalar
    """Smallest curvature that the solver met: an upper estimate of the smallest eigenvalue. NaN if it did not
    look."""
    shift: Scalar
    """δ, added to the matrix by `Damped` or `LevenbergMarquardt`."""
    error: Scalar | None
    """Estimated relative error of the hypergradient, of a solve by `UntilAccurate`."""

    @classmethod
    def of(cls, solution: Solution) -> SolveReport:
        """What a solution says of its solve."""
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
    """How the way back through a run went."""

    fault: Any = -1
    """Of the tape `Reversible`: the first leaf with a number that did not fit into fixed point; −2 if the run
    did not come back to its start, −3 if the log was full, −1 if there was none."""


COLUMNS = (
    "inner_gradient_norm", "direct_norm", "response_norm", "gradients", "products", "bytes_held",
    "solve.residual", "solve.iterations",
)  # fmt: skip
"""The numbers that a history keeps of each report."""


class Report(NamedTuple):
    """What an estimate assumed and what was measured. Norms are Euclidean over all leaves.

    ``None`` stands for what does not apply. All else are arrays or numbers, so that a compiled estimate can
    return them; `HypergradientEstimator.check` turns the faults among them into errors.
    """

    inner_gradient_norm: Scalar
    """‖∇_θ C̃1‖ at the last point where it was taken, NaN where nobody knows it."""
    direct_norm: Scalar
    """‖∂_λ C2‖, the direct term."""
    response_norm: Scalar
    """Norm of the response term: what reaches C2 through the parameters."""
    reached: Tree
    """For each hyperparameter: does the response term depend on it? By the graph; if not, it is exactly 0."""
    gradients: Scalar
    """First-order gradients spent, of C̃1 or C2 on one batch."""
    products: Scalar
    """Second-order products spent; one costs about two gradients."""
    bytes_held: Any
    """Bytes of graph or of states that were kept for the backward pass."""
    faults: Faults = Faults()
    solve: SolveReport | None = None
    """Of `Implicit`."""
    tape: TapeReport | None = None
    """Of `Unrolled`."""
    difference_error: Scalar | None = None
    """Estimated relative error of a mixed term by `FiniteDifference`."""

    def columns(self) -> dict[str, Scalar]:
        """The numbers of `COLUMNS` by name, NaN for what does not apply."""
        own = {name: getattr(self, name) for name in COLUMNS if "." not in name}
        solve, nan = self.solve, float("nan")
        return own | {
            "solve.residual": nan if solve is None else solve.residual,
            "solve.iterations": nan if solve is None else solve.iterations,
        }

    @property
    def cost(self) -> Scalar:
        """Cost in training gradients, a second-order product counting two."""
        return self.gradients + 2 * self.products
