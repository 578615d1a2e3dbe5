"""The state that a tuner keeps between steps, and the results of its methods."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypergrad.backend import Array, Scalar, Tree
from hypergrad.backend.shown import shown
from hypergrad.estimators import Estimate, State
from hypergrad.problems.step import Observation
from hypergrad.tuning.history import History


class TunerState(NamedTuple):
    """The state of a run: a tree of arrays and counters.

    ``free`` holds the hyperparameters in the free coordinates of their spaces; `Tuner.hparams` gives them
    in their own domain. ``since`` counts the training steps since λ was last updated, ``updates`` the
    updates. ``start`` is the inner state from which ``restart`` starts each unroll.
    """

    inner: State
    free: Tree
    hyper_state: Tree
    since: Any
    updates: Any
    start: Tree

    def __repr__(self) -> str:
        return shown(self)


class Step(NamedTuple):
    """The result of one call of ``step`` or ``tune``, both of `Tuner` and of ``hypergrad_torch.ModuleTuner``.

    Inside your own ``jax.jit``, ``updated`` is an array and there is always an ``estimate``; its numbers are
    meaningless if ``updated`` is false.
    """

    observed: Observation
    """The T1 loss of the last training step, the norm of its gradient, and the first step that was not
    finite. Without a training step (`Tuner.tune`): those of the estimate."""
    trained: Any
    """How many training steps were taken."""
    updated: Any
    """Was λ updated?"""
    estimate: Estimate[Any] | None
    """The estimate by which λ was updated; ``None`` if it was not."""
    clipped: Any
    """How many entries a projection put back into their space."""
    hparams: Tree
    """λ after the step, in its own domain."""

    def __repr__(self) -> str:
        return shown(self)

    @property
    def inner_value(self) -> Scalar:
        """C̃1 at the last training step."""
        return self.observed.inner_value

    @property
    def inner_values(self) -> Array:
        """C̃1 at each training step: an array of them, or a number if there was one step."""
        values = self.observed.inner_values
        return self.inner_value if values is None else values

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

    def __repr__(self) -> str:
        return shown(self)
