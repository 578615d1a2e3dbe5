"""The tape that keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hypergrad.backend import Backend, Tree
from hypergrad.tapes.base import Recording, Step, Tape, run
from hypergrad.training import Inner, Seen


@final
@dataclass(frozen=True)
class Full(Tape):
    """Keep the graph of every step and pull back through all of it at once.

    Fastest (about 3 T gradients) and largest: T training graphs in memory.
    """

    def record(self, backend: Backend, step: Step, z: Inner, hparams: Tree, length: int) -> Recording:
        def train(hparams: Tree) -> tuple[Inner, Seen]:
            return run(backend, step, z, hparams, length)

        end, pullback, seen = backend.vjp(train, hparams, has_aux=True)

        def pull(v: Inner) -> tuple[Tree, Tree]:
            return pullback(v)[0], pullback.reached[0]

        return Recording(end, seen, pull, pullback.nbytes, gradients=length, products=length)
