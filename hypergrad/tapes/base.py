"""What a tape is: a way to run T steps so that they can be pulled back through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import or_
from typing import Any, NamedTuple

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.problems.step import Inner, Observation
from hypergrad.tapes.trajectory import Pulled, Trajectory


class Recording(NamedTuple):
    """A run of T steps, and the way back: ``pull(v)``, to be called once."""

    z: Inner
    observed: Observation
    length: Any
    pull: Callable[[Inner], Pulled]
    bytes_held: Any
    gradients: Scalar
    products: Scalar


class Shelf:
    """Where a tape puts its states: here they stay as they are."""

    def put(self, z: Inner, place: Any) -> Any:
        """Put a state into a place, and return what to ask for."""
        return z

    def take(self, kept: Any) -> Inner:
        """The state that was put there."""
        found: Inner = kept
        return found


class Sweep:
    r"""The way back of a run: v ← A_kᵀ v and total ← total + B_kᵀ v, step by step, from (v, 0)."""

    def __init__(self, path: Trajectory, hparams: Tree) -> None:
        self.path, self.hparams, self._reached = path, hparams, None

    def begin(self, v: Inner) -> tuple[Inner, Tree]:
        self._reached = None
        return v, self.path.backend.zeros(self.hparams)

    def add(self, total: Tree, pulled: Pulled) -> tuple[Inner, Tree]:
        known = self._reached or pulled.reached
        self._reached = self.path.backend.map(or_, known, pulled.reached)
        return pulled.start, vectors.add(self.path.backend, total, pulled.hparams)

    def step(self, z: Inner, k: Any, carry: tuple[Inner, Tree]) -> tuple[Inner, Tree]:
        """Pull back through step k, with its state at hand."""
        v, total = carry
        return self.add(total, self.path.pull(z, self.hparams, k, v))

    def end(self, carry: tuple[Inner, Tree]) -> Pulled:
        v, total = carry
        return Pulled(total, self._reached, v)


class Tape(ABC):
    """How much of a run is kept, and how much is run again.

    Every tape gives the same hypergradient: they differ in memory and time alone.
    """

    open_ended = False
    """Can it remember a run whose length is not known beforehand?"""

    @abstractmethod
    def record(self, path: Trajectory, z: Inner, hparams: Tree) -> Recording:
        """Run the steps of a trajectory, at least one, from z."""


class Kept(NamedTuple):
    """A state, and the generator's, from which training can go on as it did."""

    z: Any
    draws: Any


@dataclass
class Generator:
    """The framework's generator, whose state is kept once for as long as nothing is drawn."""

    backend: Backend
    last: Any = field(default=None)

    def state(self) -> Any:
        """The state now: the same object as last time if nothing was drawn."""
        now = self.backend.random.state()
        if self.last is None or not _same(self.backend, now, self.last):
            self.last = now
        return self.last


def _same(backend: Backend, x: Any, y: Any) -> bool:
    pairs = zip(backend.flatten(x)[0], backend.flatten(y)[0], strict=True)
    return all(
        a is b or (len(np.shape(a)) > 0 and np.shape(a)[0] == 0) or np.array_equal(a, b) for a, b in pairs
    )
