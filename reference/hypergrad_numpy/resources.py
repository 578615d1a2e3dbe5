"""NumPy's global generator, and arrays that can be written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypergrad.backend import Array
from hypergrad.backend.memory import Memory, written_in_blocks
from hypergrad.backend.random import PythonGenerator, Random


class GlobalGenerator(Random):
    """NumPy's global generator, which ``numpy.random.normal`` and similar functions use."""

    @property
    def beside(self) -> Random:
        return PythonGenerator(self.backend)

    def state(self, seed: int | None = None) -> Any:
        return np.random.get_state() if seed is None else np.random.RandomState(seed).get_state()

    def restore(self, state: Any) -> None:
        np.random.set_state(state)


class WritableMemory(Memory):
    """Work in blocks for NumPy's arrays, which can be written to."""

    def in_blocks(
        self, f: Callable[..., Any], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        return written_in_blocks(f, used, given)
