"""The framework's own random generator: its state is read, restored and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hypergrad.backend.types import Array


class Random:
    """The generator from which losses draw without naming it. By default there is none."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend  # a Backend, which is made of this

    def state(self, seed: int | None = None) -> Any:
        """The generator's state as it is now, or as a seed makes it; ``None`` if there is no generator."""
        return None

    def restore(self, state: Any) -> None:
        """Put the generator into a state that `state` returned."""

    @contextmanager
    def replay(self, state: Any) -> Iterator[None]:
        """Inside this block the generator starts from the state given; afterwards it is as before."""
        before = self.state()
        self.restore(state)
        try:
            yield
        finally:
            self.restore(before)

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Restore the generator's state if the block raises."""
        before = self.state()
        try:
            yield
        except BaseException:
            self.restore(before)
            raise

    def normal(self, seed: int, count: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Standard normal numbers in the dtype of ``like``, a function of seed and count.

        The generator is neither used nor changed.
        """
        values = np.random.default_rng((seed, int(count))).standard_normal(shape)
        return self.backend.asarray(values, like=like)
