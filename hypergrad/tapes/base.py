"""The interface of tapes: ways to run T steps and then pull a cotangent back through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from operator import or_
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.turns import same_state
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


class Draws(NamedTuple):
    """States of the framework's generator, and of those beside it if losses draw from them."""

    own: Any
    beside: Any


class Generator:
    """The generators that a run may draw from: the framework's, and those beside it.

    The state of the framework's is stored once for as long as nothing is drawn. Those beside it are stored
    at the first two calls of `state`, and from then on if they were drawn from in between. If they are drawn
    from only later, replayed losses differ, which `Trajectory.replay` sees.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self._own = backend, None
        self._beside, self._calls = None, 0
        self._draws = not backend.compiles
        """Has nothing shown that the generators beside are not drawn from?"""

    def state(self) -> Draws:
        """Return the states: the same objects as last time if nothing was drawn since."""
        random = self.backend.random
        own = random.state()
        if self._own is None or not _same(self.backend, own, self._own):
            self._own = own
        if not self._draws:
            return Draws(self._own, None)
        beside, self._calls = random.beside.state(), self._calls + 1
        if self._calls == 2:
            self._draws = not same_state(beside, self._beside)
        self._beside = beside
        return Draws(self._own, _Opaque(beside) if self._draws else None)

    def restore(self, draws: Draws) -> None:
        """Put the generators into states that `state` returned."""
        self.backend.random.restore(draws.own)
        if draws.beside is not None:
            self.backend.random.beside.restore(draws.beside.state)

    @contextmanager
    def replay(self, draws: Draws) -> Iterator[None]:
        """Run the block from these states, and restore the present ones afterwards."""
        random = self.backend.random
        beside = nullcontext() if draws.beside is None else random.beside.replay(draws.beside.state)
        with random.replay(draws.own), beside:
            yield


@final
class _Opaque:
    """A state of a generator as one leaf of a tree."""

    def __init__(self, state: Any) -> None:
        self.state = state


def _same(backend: Backend, x: Any, y: Any) -> bool:
    pairs = zip(backend.flatten(x)[0], backend.flatten(y)[0], strict=True)
    return all(
        a is b or (len(np.shape(a)) > 0 and np.shape(a)[0] == 0) or np.array_equal(a, b) for a, b in pairs
    )
