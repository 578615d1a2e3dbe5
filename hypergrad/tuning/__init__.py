"""Tuning: parameters and hyperparameters trained together."""

from hypergrad.tuning.history import History
from hypergrad.tuning.spaces import Interval, NonNegative, Positive, Real, Simplex, Space
from hypergrad.tuning.tuner import Run, Tuner

__all__ = ["History", "Interval", "NonNegative", "Positive", "Real", "Run", "Simplex", "Space", "Tuner"]
