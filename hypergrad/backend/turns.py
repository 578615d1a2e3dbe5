"""The order of estimates in several threads, which share the random generators of the process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np


@final
class Turns:
    """Estimates whose losses draw run one after the other, and the others side by side.

    A replay puts generators into earlier states, and a draw in another thread would move them. So the first
    estimate of a problem has a turn alone. If the generators did not move in it, the problem is *quiet*, and
    later turns are shared with those of other quiet problems. One that draws after all has no quiet turns
    from then on.

    What threads draw outside of estimates is not kept apart.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._alone: int | None = None
        self._shared: set[int] = set()
        self._own = threading.local()
        self._quiet: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def turn(self, problem: Any, state: Callable[[], Any]) -> Iterator[None]:
        """Run the block in a turn of this problem, or in the turn that this thread already has.

        ``state`` returns the states of all generators.
        """
        me = threading.get_ident()
        if me == self._alone or me in self._shared:
            yield
            return
        try:
            self._begin(me, alone=not self._is_quiet(problem))
            # A program of one thread need not know what is quiet.
            self._own.learns, self._own.drew = threading.active_count() > 1, False
            before = state() if self._own.learns else None
            yield
            if before is not None:
                self._learn(problem, not self._own.drew and same_state(before, state()))
        finally:
            self._end(me)

    def compare(self, before: Any, state: Callable[[], Any]) -> None:
        """Compare states before and after a part of this thread's turn, if it learns what is quiet.

        For parts that end by putting the generators back, which hides what they drew.
        """
        if getattr(self._own, "learns", False) and not same_state(before, state()):
            self._own.drew = True

    def _begin(self, me: int, alone: bool) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._alone is None and not (alone and self._shared))
            if alone:
                self._alone = me
            else:
                self._shared.add(me)

    def _end(self, me: int) -> None:
        """End the turn of a thread, if it has one: an interrupt may have come before it had."""
        self._own.learns = False
        with self._changed:
            if self._alone == me:
                self._alone = None
            self._shared.discard(me)
            self._changed.notify_all()

    def _is_quiet(self, problem: Any) -> bool:
        known = self._quiet.get(id(problem))
        return known is not None and known() is problem

    def _learn(self, problem: Any, quiet: bool) -> None:
        with self._changed:
            if quiet and not self._is_quiet(problem):
                self._quiet = {key: known for key, known in self._quiet.items() if known() is not None}
                self._quiet[id(problem)] = weakref.ref(problem)
            elif not quiet:
                self._quiet.pop(id(problem), None)


def same_state(x: Any, y: Any) -> bool:
    """Return whether two states of generators are equal: arrays and numbers, in tuples."""
    if isinstance(x, tuple):
        return len(x) == len(y) and all(map(same_state, x, y))
    return x is y or bool(np.array_equal(x, y))


turns = Turns()
"""Those of this process, for all backends: they share the generators of Python and NumPy."""

if hasattr(os, "register_at_fork"):
    # A child has one thread, and would wait forever for the turn of another one.
    os.register_at_fork(after_in_child=turns.__init__)
