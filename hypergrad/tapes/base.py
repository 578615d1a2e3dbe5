"""The interface of tapes: ways to run T steps and then pull a cotangent back through them."""

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
    """A run of T steps, and ``pull(v)``, which pulls a cotangent back through it and is called once."""

    z: Inner
    observed: Observation
    length: Any
    pull: Callable[[Inner], Pulled]
    bytes_held: Any
    gradients: Scalar
    products: Scalar


class Storage:
    """Where a tape stores its states; this one returns them unchanged."""

    def put(self, z: Inner, place: Any) -> Any:
        """Store a state under a number, and return a handle for `take`."""
        return z

    def take(self, handle: Any) -> Inner:
        """Return the state of a handle."""
        z: Inner = handle
        return z


class Sweep:
    r"""The backward sweep of a run: v ← A_kᵀ v and total ← total + B_kᵀ v, step by step, from (v, 0)."""

    def __init__(self, path: Trajectory, hparams: Tree) -> None:
        self.path, self.hparams, self._reached = path, hparams, None

    def begin(self, v: Inner) -> tuple[Inner, Tree]:
        self._reached = None
        return v, self.path.backend.zeros(self.hparams)

    def add(self, total: Tree, pulled: Pulled) -> tuple[Inner, Tree]:
        reached = self._reached or pulled.reached
        self._reached = self.path.backend.map(or_, reached, pulled.reached)
        return pulled.start, vectors.add(self.path.backend, total, pulled.hparams)

    def step(self, z: Inner, k: Any, carry: tuple[Inner, Tree]) -> tuple[Inner, Tree]:
        """Pull back through step k, whose state is z."""
        v, total = carry
        return self.add(total, self.path.pull(z, self.hparams, k, v))

    def end(self, carry: tuple[Inner, Tree]) -> Pulled:
        v, total = carry
        return Pulled(total, self._reached, v)


class Tape(ABC):
    """How much of a run is stored, and how much is recomputed.

    Every tape gives the same hypergradient: they differ only in memory and time.
    """

    open_ended = False
    """Can it record a run whose length is not known beforehand?"""

    @abstractmethod
    def record(self, path: Trajectory, z: Inner, hparams: Tree) -> Recording:
        """Run the steps of a trajectory, at least one, starting from z."""


class Checkpoint(NamedTuple):
    """The handle of a state and the state of the random generator, from which steps can be replayed."""

    z: Any
    draws: Any


@dataclass
class Generator:
    """The framework's random generator, whose state is stored once for as long as nothing is drawn."""

    backend: Backend
    last: Any = field(default=None)

    def state(self) -> Any:
        """Return the state: the same object as last time if nothing was drawn since."""
        now = self.backend.random.state()
        if self.last is None or not _same(self.backend, now, self.last):
            self.last = now
        return self.last


def _same(backend: Backend, x: Any, y: Any) -> bool:
    pairs = zip(backend.flatten(x)[0], backend.flatten(y)[0], strict=True)
    return all(
        a is b or (len(np.shape(a)) > 0 and np.shape(a)[0] == 0) or np.array_equal(a, b) for a, b in pairs
    )
