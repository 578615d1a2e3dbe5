"""What a tape is: a way to run T steps so that they can be pulled back through."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import or_
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad import vectors
from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import ArgumentError, ReplayError
from hypergrad.training import Inner, Seen, Training


@final
@dataclass(frozen=True)
class Trajectory:
    """The steps of training that a tape remembers: k = 0 … length − 1, which are start, start + 1, …

    ``length`` is ``None`` where ``batch`` raises `StopIteration` at the end. ``to_start`` asks for what comes
    back to z_0, too.
    """

    training: Training
    batch: Callable[[Any], Tree]
    start: Any
    length: Any
    to_start: bool = False
    hashes: dict[int, bytes] | None = None

    @property
    def backend(self) -> Backend:
        return self.training.backend

    def observed(self, z: Inner, hparams: Tree, k: Any) -> tuple[Inner, Seen]:
        """(z_k, λ, k) -> (z_{k+1}, what was seen), for the first time."""
        after, seen = self.training.step(z, hparams, self.batch(k), self.start + k)
        if self.hashes is not None:
            self.hashes[k] = digest(self.backend, after)
        return after, seen

    def replayed(self, z: Inner, hparams: Tree, k: Any) -> Inner:
        """The same once more, without a look at what is known.

        Raises:
            ReplayError: if the states are verified, and this one is another than the first time.
        """
        after: Inner = self.training.advance(z, hparams, self.batch(k), self.start + k)
        if self.hashes is not None and digest(self.backend, after) != self.hashes[k]:
            t = int(self.start + k)
            raise ReplayError(
                f"training step {t}, taken again, ended in another state than the first time", t
            )
        return after

    def run(self, z: Inner, hparams: Tree) -> tuple[Inner, Seen]:
        """All steps; no graph is kept beyond what an outer derivative asks for."""
        nothing = Seen.nothing(self.backend, z.params)
        if self.length == 0:
            return z, nothing

        def body(carry: tuple[Inner, Seen], k: Any, _: Any) -> tuple[tuple[Inner, Seen], None]:
            z, seen = carry
            z, later = self.observed(z, hparams, k)
            return (z, seen.then(self.backend, later)), None

        (z, seen), _ = self.backend.scan(body, (z, nothing), self.length)
        return z, seen

    def pulled(self, z: Inner, hparams: Tree, k: Any, v: Inner) -> Pulled:
        """Step k taken again and pulled back through at once: A_kᵀ v and B_kᵀ v."""
        _, pullback = self.backend.vjp(lambda z, hparams: self.replayed(z, hparams, k), z, hparams)
        v, term = pullback.last(v)
        return Pulled(term, pullback.reached[1], v)

    def part(self, first: int, length: int) -> Trajectory:
        """Some of the steps."""
        batch = self.batch
        return replace(self, batch=lambda k: batch(first + k), start=self.start + first, length=length)

    def verified(self, verify: bool, z: Inner) -> Trajectory:
        """One that compares each replayed state with that of the first run.

        Raises:
            ArgumentError: where the values cannot be read.
        """
        if not verify:
            return self
        if self.backend.compiles or not self.backend.readable(*self.backend.flatten(z)[0]):
            raise ArgumentError(
                "verify=True reads every state, which a compiled program cannot; in JAX a step is a pure "
                "function, whose replay is itself"
            )
        return replace(self, hashes={})


class Pulled(NamedTuple):
    """What came back through a run.

    ``hparams`` is Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) v, ``reached`` says of each hyperparameter whether any B_k
    reaches it, as the graph shows, and ``start`` is A_0ᵀ ⋯ A_{T−1}ᵀ v. ``fault`` is −1 if all went well;
    see `hypergrad.tapes.reversible` for the others.
    """

    hparams: Tree
    reached: Tree
    start: Inner
    fault: Any = -1


class Recording(NamedTuple):
    """A run of T steps, and the way back: ``pull(v)``, to be called once."""

    z: Inner
    seen: Seen
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
        return self.add(total, self.path.pulled(z, self.hparams, k, v))

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
        now = self.backend.generator()
        if self.last is None or not _same(self.backend, now, self.last):
            self.last = now
        return self.last


def _same(backend: Backend, x: Any, y: Any) -> bool:
    pairs = zip(backend.flatten(x)[0], backend.flatten(y)[0], strict=True)
    return all(
        a is b or (len(np.shape(a)) > 0 and np.shape(a)[0] == 0) or np.array_equal(a, b) for a, b in pairs
    )


def digest(backend: Backend, z: Inner) -> bytes:
    """A hash of every bit of a state."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in backend.flatten(z)[0]:
        found.update(np.ascontiguousarray(backend.to_numpy(backend.detach(leaf))).tobytes())
    return found.digest()
