"""The framework's own generator: its state read, put back and replayed."""

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
        """The state of the generator, as it is now or as the seed makes it; ``None`` if there is none."""
        return None

    def restore(self, state: Any) -> None:
        """Put the generator into a state that `state` returned."""

    @contextmanager
    def replay(self, state: Any) -> Iterator[None]:
        """A block that draws from the state given, and leaves the generator as it was."""
        before = self.state()
        self.restore(state)
        try:
            yield
        finally:
            self.restore(before)

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Put the generator back as it was if the block fails."""
        before = self.state()
        try:
            yield
        except BaseException:
            self.restore(before)
            raise

    def normal(self, seed: int, count: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Standard normal numbers, the same for the same seed and count; no generator is touched."""
        values = np.random.default_rng((seed, int(count))).standard_normal(shape)
        return self.backend.asarray(values, like=like)
