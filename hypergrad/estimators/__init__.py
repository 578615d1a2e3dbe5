"""Estimators: which terms of the hypergradient's sum are kept."""

from hypergrad.estimators.assumptions import Checks
from hypergrad.estimators.base import Estimate, HypergradientEstimator, State, hypergradient
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.greedy import Greedy
from hypergrad.estimators.implicit import Implicit, adjoint
from hypergrad.estimators.report import Faults, Report, SolveReport, TapeReport
from hypergrad.estimators.unrolled import Unrolled

__all__ = [
    "Checks",
    "Estimate",
    "Faults",
    "Forward",
    "Greedy",
    "HypergradientEstimator",
    "Implicit",
    "Report",
    "SolveReport",
    "State",
    "TapeReport",
    "Unrolled",
    "adjoint",
    "hypergradient",
]
