"""How ``train`` and ``val`` are read.

    a function                t -> batch, where t is the training step; it may be traced
    a list                    batches
    an iterator, a loader     batches, one for each step; a loader is any other iterable object
    anything else             one batch for every step: an array, tuple, dict, dataclass … or ``None``, for a
                              loss without data

An estimator that needs one batch takes the first of a list, one that needs T takes the first T. A list is
always a sequence of batches: pass a batch that is itself a list (torch's ``DataLoader`` makes those) as
``tuple(batch)``. A list of bare arrays, which may be meant either way, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError

Batches = Any

_LABEL = {"train": "train (T1)", "val": "val (T2)"}


Read = Callable[[Tree, Any], Tree]
"""(data, t) -> the batch of step t."""


class Source(NamedTuple):
    """Batches as ``read(data, t)``: the arrays that a compiled program takes, and the key of this program."""

    data: Tree
    read: Read

    def __call__(self, t: Any) -> Tree:
        """Return the batch of step t."""
        return self.read(self.data, t)


def is_loader(batches: Batches) -> bool:
    """Return whether this is an object to iterate over for batches: an iterator, or a loader."""
    if callable(batches) or isinstance(batches, list | tuple | Mapping | str | bytes):
        return False
    return isinstance(batches, Iterable) and not hasattr(batches, "shape")


def one_batch(name: str, batches: Batches, step: Any) -> Tree:
    """Return the batch of one training step: the first of a list or a loader, the next of an iterator.

    Raises:
        ArgumentError: if a list is empty or ambiguous, or an iterator is exhausted.
    """
    if callable(batches):
        return batches(step)
    if isinstance(batches, list):
        return _listed(name, batches)[0]
    if is_loader(batches):
        return _take(name, batches, 1)[0]
    return batches


def every_batch(name: str, batches: Batches, step: Any) -> list[Tree]:
    """Return all batches of a list, and of anything else the one of this step.

    Raises:
        ArgumentError: as for `one_batch`.
    """
    if isinstance(batches, list):
        return BatchList(_listed(name, batches))
    return BatchList([one_batch(name, batches, step)])


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
        return batches, len(_listed(name, batches))
    if is_loader(batches):
        if one_by_one and not backend.compiles:
            return _KeptBatches(batches), None
        return until_it_ends(backend, name, BatchList(batches), start, one_by_one)
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


def window(backend: Backend, name: str, batches: Batches, start: Any, steps: int) -> Source:
    """Return the batches of ``steps`` training steps from ``start`` on, as a function of the step t.

    Raises:
        ArgumentError: if a list is ambiguous, or there are fewer batches than steps.
    """
    if callable(batches):
        return Source((), _Function(batches))
    if isinstance(batches, list) or is_loader(batches):
        given = _listed(name, batches) if isinstance(batches, list) else batches
        return Source((start, backend.stack(_take(name, given, steps))), _Window(backend))
    return single(batches)


def stream(backend: Backend, name: str, batches: Batches) -> tuple[Any, Read | None]:
    """Return batches for any number of steps, as the two arguments of `reading`.

    A list is repeated, and a single batch is used in every step. Batches of an iterator or a loader cannot
    become part of a program: they are a `Feed`, with ``None`` in place of ``read``.

    Raises:
        ArgumentError: if a list is empty or ambiguous.
    """
    if is_loader(batches):
        return Feed(name, batches), None
    if callable(batches):
        return Source((), _Function(batches))
    if not isinstance(batches, list):
        return single(batches)
    return Source(backend.stack(_listed(name, batches)), _Cycle(backend, len(batches)))


def reading(data: Any, read: Read | None) -> Batches:
    """Return the batches that ``read`` reads from the data; without it, the data are the batches."""
    return data if read is None else Source(data, read)


def single(batch: Tree) -> Source:
    """Return one batch for every step."""
    return Source(batch, _same)


@final
class BatchList(list[Tree]):
    """A list that certainly is a sequence of batches, even if each is a bare array."""


@final
class _KeptBatches:
    """Batches of an iterator or a loader, kept so that replayed steps can read them again."""

    def __init__(self, batches: Iterable[Tree]) -> None:
        self._batches, self._taken = iter(batches), list[Tree]()

    def __call__(self, k: int) -> Tree:
        while k >= len(self._taken):
            self._taken.append(next(self._batches))
        return self._taken[k]


@final
class Feed(Iterator[Tree]):
    """Batch after batch, for any number of steps: lists and loaders start again at their end.

    An iterator does not. A function is called with the number of batches before, a list goes on where that
    number of them ends, and a single batch is returned every time.
    """

    def __init__(self, name: str, batches: Batches, count: int = 0) -> None:
        if isinstance(batches, list):
            _listed(name, batches)
            started: Iterator[Tree] = iter(batches[count % len(batches) :])
        else:
            started = batches if isinstance(batches, Iterator) else iter(())
        self._name, self._batches, self._count = name, batches, count
        self._rest = started

    def __next__(self) -> Tree:
        """Return the next batch.

        Raises:
            ArgumentError: if there is none.
        """
        self._count += 1
        if not (isinstance(self._batches, list) or is_loader(self._batches)):
            return one_batch(self._name, self._batches, self._count - 1)
        for batch in self._rest:
            return batch
        if not isinstance(self._batches, Iterator):
            self._rest = iter(self._batches)
        return _take(self._name, self._rest, 1)[0]


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


def _listed(name: str, batches: list[Tree]) -> list[Tree]:
    """Check that a list holds batches, and is not itself one batch, and return it."""
    if not batches:
        raise ArgumentError(f"{_LABEL[name]} is empty: at least one batch is needed")
    if type(batches) is list and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in batches):
        raise ArgumentError(
            f"{_LABEL[name]} is a list of {len(batches)} arrays, which may be one batch, as loaders make it, "
            "or a batch for each step: pass tuple(batch) for one batch, or lambda t: batches[t] for several"
        )
    return batches


def _take(name: str, batches: Iterable[Tree], count: int) -> list[Tree]:
    taken = list(islice(iter(batches), count))
    if len(taken) < count:
        raise ArgumentError(
            f"{_LABEL[name]} is empty or exhausted: batches needed: {count}, left: {len(taken)}"
        )
    return taken
