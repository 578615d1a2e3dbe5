"""What a tuner carries from step to step, and what it hands back."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypergrad.backend import Scalar, Tree
from hypergrad.estimators import Estimate, State
from hypergrad.problems.step import Observation
from hypergrad.tuning.history import History


class TunerState(NamedTuple):
    """Where a run stands: a tree of arrays and counters.

    ``free`` holds the hyperparameters in the free coordinates of their spaces; `Tuner.hparams` gives them
    in their own domain. ``since`` counts the training steps since λ was last updated, ``updates`` the
    updates. ``start`` is the inner state to which ``restart`` goes back.
    """

    inner: State
    free: Tree
    hyper_state: Tree
    since: Any
    updates: Any
    start: Tree


class Step(NamedTuple):
    """What one call of ``step`` or ``tune`` did, of `Tuner` and of ``hypergrad_torch.ModuleTuner`` alike.

    In a program of yours that JAX compiles, ``updated`` is an array and ``estimate`` is always there; where
    ``updated`` is false its numbers mean nothing.
    """

    observed: Observation
    """The T1 loss of the last training step, the norm of its gradient, and the first step that was not
    finite. Without a training step (`Tuner.tune`): those of the estimate."""
    trained: Any
    """How many training steps were taken."""
    updated: Any
    """Was λ updated?"""
    estimate: Estimate[Any] | None
    """The estimate by which λ was updated, if it was."""
    clipped: Any
    """How many entries a projection moved back into their space."""
    hparams: Tree
    """λ after the step, in its own domain."""

    @property
    def inner_value(self) -> Scalar:
        """C̃1 at the last training step."""
        return self.observed.inner_value

    @property
    def outer_value(self) -> Scalar | None:
        """C2 as the estimate measured it, ``None`` if λ was not updated."""
        return None if self.estimate is None else self.estimate.outer_value


class Run(NamedTuple):
    """The outcome of `Tuner.run`. `Tuner.check` raises the faults of its ``last`` round."""

    params: Tree
    hparams: Tree
    state: TunerState
    history: History
    last: Step
