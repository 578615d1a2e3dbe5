"""The training steps that a tape records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import ArgumentError, ReplayError
from hypergrad.problems.step import Inner, Observation, Training


@final
@dataclass(frozen=True)
class Trajectory:
    """The training steps k = 0 … length − 1 that a tape records; step k has the number start + k.

    ``length`` is ``None`` if the run ends where ``batch`` raises `StopIteration`. With ``to_start`` the
    cotangent of z_0 is computed, too.
    """

    training: Training
    batch: Callable[[Any], Tree]
    start: Any
    length: Any
    to_start: bool = False
    hashes: dict[int, bytes] | None = None
    losses: dict[Any, float] = field(default_factory=dict)
    """The loss of each step in the first run, as far as they can be read."""

    @cached_property
    def backend(self) -> Backend:
        return self.training.backend

    def unobserved(self, z: Inner) -> Observation:
        """Return the observation before the first step, in which the losses of all steps are collected."""
        return Observation.none(self.backend, z.params, self.length)

    def step(self, z: Inner, observed: Observation, hparams: Tree, k: Any) -> tuple[Inner, Observation]:
        """Run step k for the first time: return z_{k+1}, and what was observed until then."""
        after, later = self.training.step(z, hparams, self.batch(k), self.start + k)
        self.note(k, later.inner_value)
        if self.hashes is not None:
            self.hashes[k] = digest(self.backend, after)
        return after, observed.then(self.backend, later, k)

    def replay(self, z: Inner, hparams: Tree, k: Any) -> Inner:
        """Replay step k: (z_k, λ, k) -> z_{k+1}.

        Raises:
            ReplayError: if the loss differs from that of the first run by more than rounding; and if states
                are verified, and this one differs from that of the first run.
        """
        after, value = self.training.advance(z, hparams, self.batch(k), self.start + k)
        self.compare(k, value)
        if self.hashes is not None and digest(self.backend, after) != self.hashes[k]:
            t = int(self.start + k)
            raise ReplayError(
                f"training step {t} ended in another state when it was replayed than in the first run", t
            )
        return after

    def note(self, k: Any, value: Scalar) -> None:
        """Note the loss of a step in the first run, if it can be read without waiting."""
        if (
            not self.backend.compiles
            and (loss := self.backend.number(self.backend.detach(value))) is not None
        ):
            self.losses[self._number(k)] = loss

    def compare(self, k: Any, value: Scalar) -> None:
        """Compare the loss of a replayed step with that of the first run.

        Raises:
            ReplayError: if they differ by more than rounding explains.
        """
        if not self.losses:
            return
        now, before = self.backend.number(self.backend.detach(value)), self.losses.get(self._number(k))
        if now is None or before is None or now == before or not (np.isfinite(now) and np.isfinite(before)):
            return
        if abs(now - before) > np.finfo(now.dtype).eps ** 0.5 * max(abs(now), abs(before)):
            t = self._number(k)
            raise ReplayError(
                f"the training loss of step {t} was {before:.9g} in the first run and {now:.9g} when the "
                "step was replayed",
                t,
            )

    def _number(self, k: Any) -> int:
        return int(self.start + k)

    def run(self, z: Inner, hparams: Tree) -> tuple[Inner, Observation]:
        """Run all steps; keep no graph beyond what an outer derivative needs."""
        if self.length == 0:
            return z, Observation.none(self.backend, z.params)

        def body(carry: tuple[Inner, Observation], k: Any, _: Any) -> tuple[tuple[Inner, Observation], None]:
            return self.step(*carry, hparams, k), None

        (z, observed), _ = self.backend.scan(body, (z, self.unobserved(z)), self.length)
        return z, observed

    def pull(self, z: Inner, hparams: Tree, k: Any, v: Inner) -> Pulled:
        """Replay step k and pull back through it: return A_kᵀ v and B_kᵀ v."""
        _, pullback = self.backend.pullback(lambda z, hparams: self.replay(z, hparams, k), z, hparams)
        v, term = pullback.last(v)
        return Pulled(term, pullback.reached[1], v)

    def part(self, first: int, length: int) -> Trajectory:
        """Return the ``length`` steps from ``first`` on."""
        batch = self.batch
        return replace(self, batch=lambda k: batch(first + k), start=self.start + first, length=length)

    def verified(self, verify: bool, z: Inner) -> Trajectory:
        """Return the trajectory; with ``verify`` it compares each replayed state with that of the first run.

        Raises:
            ArgumentError: where the values cannot be read.
        """
        if not verify:
            return self
        if self.backend.compiles or not self.backend.readable(*self.backend.flatten(z)[0]):
            raise ArgumentError(
                "verify=True reads every state, which a compiled program cannot; in JAX a step is a pure "
                "function, so its replay cannot differ"
            )
        return replace(self, hashes={})


def digest(backend: Backend, z: Inner) -> bytes:
    """Return a hash of every bit of a state."""
    hasher = hashlib.blake2b(digest_size=16)
    for leaf in backend.flatten(z)[0]:
        hasher.update(np.ascontiguousarray(backend.to_numpy(backend.detach(leaf))).tobytes())
    return hasher.digest()


class Pulled(NamedTuple):
    """Cotangents that were pulled back through a run.

    ``hparams`` is Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) v, ``reached`` says of each hyperparameter whether any B_k
    reaches it, as the graph shows, and ``start`` is A_0ᵀ ⋯ A_{T−1}ᵀ v. ``fault`` is −1 if all went well;
    `hypergrad.tapes.reversible.tape` lists the other values.
    """

    hparams: Tree
    reached: Tree
    start: Inner
    fault: Any = -1
