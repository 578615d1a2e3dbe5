"""Solvers of H x = v, matrix-free, on trees."""

from hypergrad.solvers.base import Solution, Solver
from hypergrad.solvers.cg import CG
from hypergrad.solvers.direct import Direct
from hypergrad.solvers.identity import Identity
from hypergrad.solvers.neumann import Neumann

__all__ = ["CG", "Direct", "Identity", "Neumann", "Solution", "Solver"]
