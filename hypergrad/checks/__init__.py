"""Is a hypergradient right, how far off can it be, and which way to take it is faster?"""

from hypergrad.checks.bound import error_bound
from hypergrad.checks.derivatives import DerivativeCheck, check_derivatives
from hypergrad.checks.hypergradient import Check, check_hypergradient
from hypergrad.checks.probe import Probe, probe

__all__ = [
    "Check",
    "DerivativeCheck",
    "Probe",
    "check_derivatives",
    "check_hypergradient",
    "error_bound",
    "probe",
]
