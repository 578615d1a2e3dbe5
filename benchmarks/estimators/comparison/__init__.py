"""Estimators and searches on eight problems; ``python -m benchmarks.estimators.compare`` runs it."""
