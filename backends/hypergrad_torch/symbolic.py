"""Tensors without a value that can be read now."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def is_symbolic(x: Tensor) -> bool:
    """Is there no value that could be read without waiting for a device?"""
    return not x.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(x) or isinstance(x, FakeTensor)
