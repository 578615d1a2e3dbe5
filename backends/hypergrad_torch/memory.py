"""Tensors in page-locked memory of the host, and work in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.backend import Array, Tree
from hypergrad.backend.memory import BLOCK, Memory, written_in_blocks

LAUNCHED = 2**20
"""Elements of a block on a device, where smaller blocks take as long."""


class TorchMemory(Memory):
    """Copies between host and CUDA devices, which run while the device computes."""

    def to_host(self, tree: Tree) -> Tree:
        return self.backend.map(_pinned, tree)

    def from_host(self, tree: Tree) -> Tree:
        return self.backend.map(lambda x: x.back() if isinstance(x, _Pinned) else x, tree)

    def in_blocks(
        self, f: Callable[..., tuple[Sequence[Array], Any]], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        on_host = [*used, *given][0].device.type == "cpu"
        return written_in_blocks(f, used, given, BLOCK if on_host else LAUNCHED)


@dataclass(frozen=True)
class _Pinned:
    """A tensor in page-locked memory, and the device that it came from."""

    held: Tensor
    device: torch.device

    def back(self) -> Tensor:
        return self.held.to(self.device, non_blocking=True)


def _pinned(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.device.type != "cuda":
        return x
    held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return _Pinned(held.copy_(x, non_blocking=True), x.device)
