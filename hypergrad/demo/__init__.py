"""The demonstration: one command compares estimators on real data, on equal budgets."""

from hypergrad.demo.compare import Comparison, Contestant, compare

__all__ = ["Comparison", "Contestant", "compare"]
