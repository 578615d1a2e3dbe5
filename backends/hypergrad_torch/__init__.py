"""PyTorch for `hypergrad`: tensors, modules and optimisers, on CPU and CUDA.

`TorchBackend` serves every estimator of `hypergrad` on tensors. `ModuleTuner` trains an ``nn.Module`` in
place with its own ``torch.optim`` optimiser, and tunes hyperparameters on the way. `compile` makes one
program of a whole estimate.
"""

from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.compiled import compile
from hypergrad_torch.module import ModuleTuner
from hypergrad_torch.optimizers import TorchOptimizer
from hypergrad_torch.recompute import checkpoint_context

__all__ = ["ModuleTuner", "TorchBackend", "TorchOptimizer", "checkpoint_context", "compile"]
