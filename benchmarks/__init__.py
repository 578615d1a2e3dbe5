"""What estimators find, and what they cost: each benchmark is one command, ``python -m benchmarks.…``."""
