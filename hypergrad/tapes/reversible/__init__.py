"""Momentum descent that runs backwards, bit for bit."""

from hypergrad.tapes.reversible.tape import Reversible

__all__ = ["Reversible"]
