"""PyTorch for `hypergrad`: tensors, modules and optimisers, on CPU and CUDA."""

from hypergrad_torch.backend import TorchBackend

__all__ = ["TorchBackend"]
