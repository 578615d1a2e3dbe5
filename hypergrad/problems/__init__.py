"""Problems: the condition that parameters satisfy, the validation loss, and the data."""

from hypergrad.problems.base import Problem, Validation
from hypergrad.problems.bilevel import Bilevel
from hypergrad.problems.derivatives import Derivatives
from hypergrad.problems.fixed_point import FixedPoint
from hypergrad.problems.level import Level

__all__ = ["Bilevel", "Derivatives", "FixedPoint", "Level", "Problem", "Validation"]
