"""What the comparison asks of a framework and of an entry, and the settings that all are given."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy

from benchmarks.peers.losses import Words, losses
from benchmarks.peers.workloads import Workload

RTOL, MOST = 1e-6, 5000
"""The tolerance of every solve that takes one, and the steps that the best setting of each may take."""


@dataclass(frozen=True)
class Task:
    """A workload in the words of a framework: C̃1(θ, λ, batch) and C2(θ, λ, batch), and their arguments."""

    workload: Workload
    inner: Callable[..., Any]
    outer: Callable[..., Any]
    params: Any
    hparams: Any
    train: Any
    val: Any

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.params, self.hparams, self.train, self.val

    @classmethod
    def of(cls, workload: Workload, words: Words) -> "Task":
        params = workload.params
        params = (
            {k: words.array(p) for k, p in params.items()}
            if isinstance(params, dict)
            else words.array(params)
        )
        train, val = (tuple(map(words.array, batch)) for batch in (workload.train, workload.val))
        return cls(workload, *losses(workload, words), params, words.array(workload.hparams), train, val)

    def counting(self, words: Words, dot: Callable[..., Any]) -> "Task":
        """The same with a product that counts itself."""
        inner, outer = losses(self.workload, words, dot)
        return replace(self, inner=inner, outer=outer)


class Entry(NamedTuple):
    """One way to the hypergradient: a function of (θ, λ, train, val). ``finish`` turns what a compiled
    program returned into the hypergradient, or raises; it is timed too.
    """

    library: str
    setting: str
    function: Callable[..., Any]
    finish: Callable[[Any], Any] = lambda found: found


class Outcome(NamedTuple):
    """What came of an entry: numbers, or the words of an error."""

    value: numpy.ndarray | None
    said: str = ""
    memory: float = float("nan")
    products: float = float("nan")
    compiled: float = float("nan")
    """Seconds that it took to make the program; no time of a run has them in it."""
