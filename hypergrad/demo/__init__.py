"""The main job: estimators compared on equal budgets, on real data, by one command."""

from hypergrad.demo.compare import Comparison, Contestant, compare

__all__ = ["Comparison", "Contestant", "compare"]
