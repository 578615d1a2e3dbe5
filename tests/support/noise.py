"""Noise that a loss draws itself."""

import numpy as np


def normal(backend, *shape):
    """Standard normal numbers from the framework's own global generator; JAX has none."""
    if backend.name == "torch":
        import torch

        return torch.randn(shape, dtype=torch.float64)
    return np.random.normal(size=shape) if backend.name == "numpy" else None
