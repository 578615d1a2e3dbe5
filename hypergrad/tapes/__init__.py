"""Tapes: how `Unrolled` remembers the run that it differentiates."""

from hypergrad.tapes.base import Pulled, Recording, Shelf, Tape, Trajectory
from hypergrad.tapes.binomial import Binomial
from hypergrad.tapes.full import Full
from hypergrad.tapes.offload import Offload
from hypergrad.tapes.reversible import Reversible
from hypergrad.tapes.states import States

__all__ = [
    "Binomial",
    "Full",
    "Offload",
    "Pulled",
    "Recording",
    "Reversible",
    "Shelf",
    "States",
    "Tape",
    "Trajectory",
]
