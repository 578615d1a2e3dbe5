"""The tape that keeps the graph of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hypergrad.backend import Tree
from hypergrad.problems.step import Inner, Observation
from hypergrad.tapes.base import Recording, Tape
from hypergrad.tapes.trajectory import Pulled, Trajectory


@final
@dataclass(frozen=True)
class Full(Tape):
    """Keep the graph of every step and pull back through all of them in one pass.

    Fastest (about 3 T gradients) and largest: T training graphs in memory.
    """

    def record(self, path: Trajectory, z: Inner, hparams: Tree) -> Recording:
        def train(z: Inner, hparams: Tree) -> tuple[Inner, Observation]:
            return path.run(z, hparams)

        end, pullback, observed = path.backend.vjp(train, z, hparams)

        def pull(v: Inner) -> Pulled:
            start, total = pullback(v) if path.to_start else (v, pullback.onto(1)(v))
            return Pulled(total, pullback.reached[1], start)

        return Recording(end, observed, path.length, pull, pullback.nbytes, path.length, path.length)
