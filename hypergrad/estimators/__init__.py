"""Estimators: which terms of the hypergradient's sum are kept."""

from hypergrad.estimators.base import Estimate, HypergradientEstimator, Report, State, hypergradient
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.greedy import Greedy
from hypergrad.estimators.implicit import Implicit, adjoint
from hypergrad.estimators.unrolled import Unrolled

__all__ = [
    "Estimate",
    "Forward",
    "Greedy",
    "HypergradientEstimator",
    "Implicit",
    "Report",
    "State",
    "Unrolled",
    "adjoint",
    "hypergradient",
]
