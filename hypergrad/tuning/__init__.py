"""Tuning: parameters and hyperparameters trained together."""

from hypergrad.tuning.history import History
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.spaces import Interval, NonNegative, Positive, Real, Simplex, Space
from hypergrad.tuning.state import Run, Step, TunerState
from hypergrad.tuning.tuner import Tuner

__all__ = [
    "History",
    "Interval",
    "NonNegative",
    "Positive",
    "Real",
    "Recipe",
    "Run",
    "Simplex",
    "Space",
    "Step",
    "Tuner",
    "TunerState",
]
