"""The tape that keeps the state of every step, and no graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Tree, vectors
from hypergrad.problems.step import Inner, Observation
from hypergrad.tapes.base import Checkpoint, Generator, Recording, Storage, Sweep, Tape
from hypergrad.tapes.trajectory import Pulled, Trajectory


@final
@dataclass(frozen=True)
class States(Tape):
    r"""Keep z_0 … z_{T−1}, and replay the steps in reverse order, each with one pull-back of (z, λ) ↦ Φ.

        v ← A_kᵀ v,   dC2/dλ += B_kᵀ v        k = T−1 … 0,  both from one pull-back

    About 4 T gradients, and one copy of z for each step. A replayed step makes the same random draws as the
    first time.

    Args:
        verify: compare each replayed state with the first one, bit for bit, and raise `ReplayError` where
            they differ. For debugging; not available in compiled programs or in JAX.
    """

    verify: bool = False

    def record(self, path: Trajectory, z: Inner, hparams: Tree, storage: Storage | None = None) -> Recording:
        backend, path, storage = path.backend, path.verified(self.verify, z), storage or Storage()
        generator = Generator(backend)

        def forward(
            carry: tuple[Inner, Observation], k: Any, _: Any
        ) -> tuple[tuple[Inner, Observation], Checkpoint]:
            z, observed = carry
            checkpoint = Checkpoint(storage.put(z, k), generator.state())
            return path.step(z, observed, hparams, k), checkpoint

        (end, observed), states = backend.scan(forward, (z, path.unobserved(z)), path.length)
        sweep = Sweep(path, hparams)

        def backward(
            carry: tuple[Inner, Tree], k: Any, checkpoint: Checkpoint
        ) -> tuple[tuple[Inner, Tree], None]:
            with generator.replay(checkpoint.draws):
                return sweep.step(storage.take(checkpoint.z), k, carry), None

        def pull(v: Inner) -> Pulled:
            carry, _ = backend.scan(backward, sweep.begin(v), path.length, xs=states, reverse=True)
            return sweep.end(carry)

        held = path.length * vectors.nbytes(backend, z)
        return Recording(end, observed, path.length, pull, held, 2 * path.length, path.length)
