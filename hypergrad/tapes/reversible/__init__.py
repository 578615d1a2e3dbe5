"""Momentum descent that can be run backwards, bit for bit."""

from hypergrad.tapes.reversible.tape import Reversible

__all__ = ["Reversible"]
