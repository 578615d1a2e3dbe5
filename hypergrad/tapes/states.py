"""The tape that keeps the states alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Tree, vectors
from hypergrad.problems.step import Inner, Observation
from hypergrad.tapes.base import Generator, Kept, Recording, Shelf, Sweep, Tape
from hypergrad.tapes.trajectory import Pulled, Trajectory


@final
@dataclass(frozen=True)
class States(Tape):
    r"""Keep z_0 … z_{T−1}, and replay each step with one pull-back of (z, λ) ↦ Φ on the way back.

        v ← A_kᵀ v,   dC2/dλ += B_kᵀ v        k = T−1 … 0,  both from one pull-back

    About 4 T gradients, and one copy of z for each step. A replayed step draws from the framework's
    generator what it drew the first time.

    Args:
        verify: compare each replayed state with the first one, bit for bit, and raise `ReplayError` where
            they differ. For debugging: not in compiled programs, and not in JAX.
    """

    verify: bool = False

    def record(self, path: Trajectory, z: Inner, hparams: Tree, shelf: Shelf | None = None) -> Recording:
        backend, path, shelf = path.backend, path.verified(self.verify, z), shelf or Shelf()
        generator = Generator(backend)

        def forward(
            carry: tuple[Inner, Observation], k: Any, _: Any
        ) -> tuple[tuple[Inner, Observation], Kept]:
            z, observed = carry
            kept = Kept(shelf.put(z, k), generator.state())
            after, later = path.step(z, hparams, k)
            return (after, observed.then(backend, later)), kept

        start = z, Observation.none(backend, z.params)
        (end, observed), states = backend.scan(forward, start, path.length)
        sweep = Sweep(path, hparams)

        def backward(carry: tuple[Inner, Tree], k: Any, kept: Kept) -> tuple[tuple[Inner, Tree], None]:
            with backend.random.replay(kept.draws):
                return sweep.step(shelf.take(kept.z), k, carry), None

        def pull(v: Inner) -> Pulled:
            carry, _ = backend.scan(backward, sweep.begin(v), path.length, xs=states, reverse=True)
            return sweep.end(carry)

        held = path.length * vectors.nbytes(backend, z)
        return Recording(end, observed, path.length, pull, held, 2 * path.length, path.length)
