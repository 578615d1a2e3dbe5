"""Random generators that losses draw from: their states are read, restored and replayed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from hypergrad.backend.turns import turns
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

    @property
    def beside(self) -> Random:
        """The generators of the host, from which losses may draw, too."""
        return HostGenerators(self.backend)

    @contextmanager
    def replay(self, state: Any) -> Iterator[None]:
        """Run the block from the given state of the generator, and restore the present state afterwards."""
        before = self.state()
        self.restore(state)
        try:
            yield
        finally:
            turns.compare(state, self.state)
            self.restore(before)

    def turn(self, problem: Any, undo: bool = True) -> AbstractContextManager[None]:
        """Run the block, in which losses of a problem may draw, and restore the generator if it raises.

        Without ``undo`` it is not restored: for blocks of several steps, of which those before the fault
        stay. No other estimate draws or replays meanwhile: see `hypergrad.backend.turns`. Where generators
        are arguments, as in JAX, there is nothing to keep apart.
        """
        return self._turn(problem, undo)

    @contextmanager
    def _turn(self, problem: Any, undo: bool) -> Iterator[None]:
        with turns.turn(problem, self._all_states):
            before = self.state()
            try:
                yield
            except BaseException:
                if undo:
                    self.restore(before)
                raise

    def _all_states(self) -> tuple[Any, Any]:
        return self.state(), self.beside.state()

    def normal(self, seed: int, count: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Return standard normal numbers in the dtype of ``like``, which depend on seed and count alone.

        The generator is neither used nor changed.
        """
        values = np.random.default_rng((seed, int(count))).standard_normal(shape)
        return self.backend.asarray(values, like=like)


class HostGenerators(Random):
    """The global generators of Python and NumPy, which every loss can reach. Reading both takes 50 µs."""

    def state(self, seed: int | None = None) -> Any:
        return random.getstate(), np.random.get_state()

    def restore(self, state: Any) -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])


class PythonGenerator(Random):
    """The global generator of Python alone."""

    def state(self, seed: int | None = None) -> Any:
        return random.getstate()

    def restore(self, state: Any) -> None:
        random.setstate(state)
