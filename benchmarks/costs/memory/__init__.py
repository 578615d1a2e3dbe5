"""Memory and cost of a differentiated training run; ``python -m benchmarks.costs.memory`` runs it."""
