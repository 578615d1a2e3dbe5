"""The framework's own random generator: its state is read, restored and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hypergrad.backend.types import Array


class Random:
    """The framework's implicit generator, from which losses may draw. By default there is none."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend  # the `Backend` that this object is part of

    def state(self, seed: int | None = None) -> Any:
        """Return the generator's present state, or that of a seed; ``None`` if there is no generator."""
        return None

    def restore(self, state: Any) -> None:
        """Put the generator into a state that `state` returned."""

    @contextmanager
    def replay(self, state: Any) -> Iterator[None]:
        """Run the block from the given state of the generator, and restore the present state afterwards."""
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
        """Return standard normal numbers in the dtype of ``like``, which depend on seed and count alone.

        The generator is neither used nor changed.
        """
        values = np.random.default_rng((seed, int(count))).standard_normal(shape)
        return self.backend.asarray(values, like=like)
