"""The NumPy reference: a backend on HIPS autograd, and `textbook`, the formulas with dense Jacobians.

Losses are written with ``autograd.numpy`` in place of ``numpy``. Read `textbook` first.
"""

from hypergrad_numpy.backend import NumpyBackend

__all__ = ["NumpyBackend"]
