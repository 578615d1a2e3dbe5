"""Tapes: how `Unrolled` stores the run that it differentiates."""

from hypergrad.tapes.base import Recording, Storage, Tape
from hypergrad.tapes.binomial import Binomial
from hypergrad.tapes.full import Full
from hypergrad.tapes.offload import Offload
from hypergrad.tapes.reversible.tape import Reversible
from hypergrad.tapes.states import States
from hypergrad.tapes.trajectory import Pulled, Trajectory

__all__ = [
    "Binomial",
    "Full",
    "Offload",
    "Pulled",
    "Recording",
    "Reversible",
    "States",
    "Storage",
    "Tape",
    "Trajectory",
]
