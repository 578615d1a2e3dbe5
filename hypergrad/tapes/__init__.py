"""Tapes: how `Unrolled` remembers the run that it differentiates."""

from hypergrad.tapes.base import Recording, Step, Tape
from hypergrad.tapes.full import Full
from hypergrad.tapes.states import States

__all__ = ["Full", "Recording", "States", "Step", "Tape"]
