"""Checks: whether a hypergradient is right, how large its error can be, and which computation is faster."""

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
