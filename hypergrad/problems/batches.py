"""How ``train`` and ``val`` are read.

    a function      t -> batch, where t is the training step; it may be traced
    a list          a sequence of batches
    an iterator     yields batches, one for each step
    anything else   one batch: an array, tuple, dict, dataclass … or ``None``, for a loss without data

An estimator that needs one batch takes the first of a list, one that needs T takes the first T. A list
is always a sequence of batches, so pass a batch that is itself a list (torch's ``DataLoader`` makes those)
as ``tuple(batch)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError

Batches = Any

_LABEL = {"train": "train (T1)", "val": "val (T2)"}


class Source(NamedTuple):
    """Batches as ``read(data, t)``: the arrays that a compiled program takes, and the key of this program."""

    data: Tree
    read: Callable[[Tree, Any], Tree]

    def __call__(self, t: Any) -> Tree:
        """Return the batch of step t."""
        return self.read(self.data, t)


def one_batch(name: str, batches: Batches, step: Any) -> Tree:
    """Return the batch of one training step: the first of a list, the next of an iterator.

    Raises:
        ArgumentError: if a list is empty or an iterator is exhausted.
    """
    if callable(batches):
        return batches(step)
    if isinstance(batches, Iterator | list):
        return _take(name, iter(batches), 1)[0]
    return batches


def every_batch(name: str, batches: Batches, step: Any) -> list[Tree]:
    """Return all batches of a list, or, of a function or an iterator, the one of this step.

    Raises:
        ArgumentError: if there are none.
    """
    every = batches if isinstance(batches, list) else [one_batch(name, batches, step)]
    if not every:
        raise ArgumentError(f"{_LABEL[name]} is empty: at least one batch is needed")
    return every


def batch_series(
    backend: Backend, name: str, batches: Batches, start: Any, steps: int
) -> Callable[[Any], Tree]:
    """Return the batches of ``steps`` training steps from ``start`` on, as a function of k = 0 … steps−1.

    Raises:
        ArgumentError: as for `window`.
    """
    data, read = window(backend, name, batches, start, steps)
    if isinstance(read, _Window):  # the start may be traced where k is not
        return lambda k: backend.take(data[1], k)
    return lambda k: read(data, start + k)


def until_it_ends(
    backend: Backend, name: str, batches: Batches, start: Any, one_by_one: bool
) -> tuple[Batches, int | None]:
    """Return the batches of a run that lasts until they are exhausted, and how many there are.

    With ``one_by_one`` they need not be counted: the first result is then a function of k = 0, 1, … that
    raises `StopIteration` at the end, and the second is ``None``.

    Raises:
        ArgumentError: if there are no batches, or ``batches`` is a single one. An endless source is not
            detected.
    """
    if isinstance(batches, list):
        return batches, len(every_batch(name, batches, start))
    if isinstance(batches, Iterator):
        if one_by_one and not backend.compiles:
            return _KeptBatches(batches), None
        return until_it_ends(backend, name, list(batches), start, one_by_one)
    if not callable(batches):
        raise ArgumentError(f"{_LABEL[name]} is one batch, which does not say how many steps to take")
    if backend.compiles:
        raise ArgumentError(
            f"{_LABEL[name]} is a function, but a compiled run needs a fixed length: pass the number of "
            "steps, or a list of batches"
        )
    if one_by_one:
        return lambda k: batches(start + k), None
    count, draws = 0, backend.random.state()
    try:
        while True:
            batches(start + count)
            count += 1
    except StopIteration:
        backend.random.restore(draws)
    if count == 0:
        raise ArgumentError(f"{_LABEL[name]} is empty: at least one batch is needed")
    return batches, count


@final
class _KeptBatches:
    """Batches of an iterator, kept so that replayed steps can read them again."""

    def __init__(self, batches: Iterator[Tree]) -> None:
        self._batches, self._taken = batches, list[Tree]()

    def __call__(self, k: int) -> Tree:
        if k == len(self._taken):
            self._taken.append(next(self._batches))
        return self._taken[k]


def window(backend: Backend, name: str, batches: Batches, start: Any, steps: int) -> Source:
    """Return the batches of ``steps`` training steps from ``start`` on, as a function of the step t.

    Raises:
        ArgumentError: if there are fewer batches than steps, or one batch for more than one step.
    """
    if callable(batches):
        return Source((), _Function(batches))
    if batches is None:
        return single(None)
    if isinstance(batches, Iterator | list):
        return Source((start, backend.stack(_take(name, iter(batches), steps))), _Window(backend))
    if steps == 1:
        return single(batches)
    raise ArgumentError(
        f"{_LABEL[name]}: {steps} steps need {steps} batches, and a {type(batches).__name__} is one batch: "
        "pass a list of batches, or a function t -> batch (lambda t: batch, to train always on this one)"
    )


def stream(backend: Backend, name: str, batches: Batches) -> Source:
    """Return batches for any number of steps: a list is repeated, a single batch is used in every step.

    Raises:
        ArgumentError: if a list is empty.
    """
    if isinstance(batches, Iterator):
        return Source((), _Function(lambda t: one_batch(name, batches, t)))
    if callable(batches):
        return Source((), _Function(batches))
    if not isinstance(batches, list):
        return single(batches)
    if not batches:
        raise ArgumentError(f"{_LABEL[name]} is empty: at least one batch is needed")
    return Source(backend.stack(batches), _Cycle(backend, len(batches)))


@final
@dataclass(frozen=True)
class _Function:
    """A function t -> batch."""

    f: Callable[[Any], Tree]

    def __call__(self, data: Tree, t: Any) -> Tree:
        return self.f(t)


@final
@dataclass(frozen=True)
class _Window:
    """A list of batches, of which the first belongs to step ``start``."""

    backend: Backend

    def __call__(self, data: Tree, t: Any) -> Tree:
        start, batches = data
        return self.backend.take(batches, t - start)


@final
@dataclass(frozen=True)
class _Cycle:
    """A list of batches that starts again at its end."""

    backend: Backend
    length: int

    def __call__(self, data: Tree, t: Any) -> Tree:
        return self.backend.take(data, t % self.length)


def _same(data: Tree, t: Any) -> Tree:
    """Return the batch that every step uses."""
    return data


def single(batch: Tree) -> Source:
    """Return one batch for every step."""
    return Source(batch, _same)


def _take(name: str, batches: Iterator[Tree], count: int) -> list[Tree]:
    taken = list(islice(batches, count))
    if len(taken) < count:
        raise ArgumentError(
            f"{_LABEL[name]} is empty or exhausted: batches needed: {count}, left: {len(taken)}"
        )
    return taken
