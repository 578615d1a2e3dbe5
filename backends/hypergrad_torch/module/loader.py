"""Batches for `ModuleTuner.run`, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

from torch import Tensor

from hypergrad.errors import ArgumentError

_LABEL = {"train": "train (T1)", "val": "val (T2)"}


@final
class Feed:
    """Hands out batch after batch of what `hypergrad.problems.batches` describes, and of loaders.

    A list or a loader starts again at its end, an iterator does not. A function is called with the count. A
    tensor, a dict, a tuple, or anything else that is not iterable, is one batch for every step.
    """

    def __init__(self, name: str, batches: Any) -> None:
        self._name, self._batches = name, batches
        self._one = isinstance(batches, Tensor | Mapping | tuple) or not isinstance(batches, Iterable)
        self._rest: Iterator[Any] = batches if isinstance(batches, Iterator) else iter(())

    def __call__(self, count: int) -> Any:
        """The next batch.

        Raises:
            ArgumentError: if there is none.
        """
        if callable(self._batches):
            return self._batches(count)
        if self._one:
            return self._batches
        for batch in self._rest:
            return batch
        if not isinstance(self._batches, Iterator):
            self._rest = iter(self._batches)
            for batch in self._rest:
                return batch
        raise ArgumentError(f"{_LABEL[self._name]} is empty or exhausted")
