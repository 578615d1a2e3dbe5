"""The training steps that a tape remembers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError, ReplayError
from hypergrad.problems.step import Inner, Seen, Training


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
        _, pullback = self.backend.pullback(lambda z, hparams: self.replayed(z, hparams, k), z, hparams)
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


def digest(backend: Backend, z: Inner) -> bytes:
    """A hash of every bit of a state."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in backend.flatten(z)[0]:
        found.update(np.ascontiguousarray(backend.to_numpy(backend.detach(leaf))).tobytes())
    return found.digest()


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
