"""The tape that keeps the states alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from hypergrad import vectors
from hypergrad.backend import Backend, Tree
from hypergrad.tapes.base import Recording, Step, Tape
from hypergrad.training import Inner, Seen


@final
@dataclass(frozen=True)
class States(Tape):
    r"""Keep z_0 … z_{T−1}, and replay each step with one pull-back of (z, λ) ↦ Φ on the way back.

        v ← A_kᵀ v,   dC2/dλ += B_kᵀ v        k = T−1 … 0,  both from one pull-back

    About 4 T gradients, and one copy of z for each step. A replayed step draws from the framework's
    generator what it drew the first time.
    """

    def record(self, backend: Backend, step: Step, z: Inner, hparams: Tree, length: int) -> Recording:
        def forward(carry: tuple[Inner, Seen], k: Any, _: Any) -> tuple[tuple[Inner, Seen], Any]:
            z, seen = carry
            draws = backend.generator()
            after, later = step(z, hparams, k)
            return (after, seen.then(backend, later)), (z, draws)

        start = z, Seen.nothing(backend, z.params)
        (end, seen), states = backend.scan(forward, start, length)
        reached: list[Tree] = []

        def backward(carry: tuple[Inner, Tree], k: Any, kept: Any) -> tuple[tuple[Inner, Tree], None]:
            v, total = carry
            z, draws = kept
            with backend.replay(draws):
                _, pullback = backend.vjp(lambda z, hparams: step(z, hparams, k)[0], z, hparams)
            v, term = pullback(v)
            reached.append(pullback.reached[1])
            return (v, vectors.add(backend, total, term)), None

        def pull(v: Inner) -> tuple[Tree, Tree]:
            reached.clear()
            begin = v, backend.zeros(hparams)
            (_, total), _ = backend.scan(backward, begin, length, xs=states, reverse=True)
            return total, backend.map(lambda *seen: any(seen), *reached)

        held = length * vectors.nbytes(backend, z)
        return Recording(end, seen, pull, held, gradients=2 * length, products=length)
