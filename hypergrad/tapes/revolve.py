r"""Binomial checkpointing: which states to keep, and which steps to run again, as plain data.

A run of l steps is pulled back from its last step to its first, and step k needs its state z_k. With room for
c states, the one of z_0 among them, one advances m steps, keeps the state there, pulls back the l − m steps
behind it with c − 1, and then the m before it with c again:

    t(l, c) = min_m  m + t(m, c) + t(l − m, c − 1),    t(1, c) = 0
            = r l − β(c + 1, r − 1),                    β(c, r) = (c + r)! / (c! r!)

where r is the least number with l ≤ β(c, r): no step is run more than r times (Griewank and Walther 2000,
algorithm 799, whose closed form this is). All of it is known before the first array is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import comb, inf
from typing import NamedTuple, final

from hypergrad.errors import ArgumentError


class Move(NamedTuple):
    """At step ``start`` put the state into ``slot``, if there is one, and advance ``count`` steps."""

    start: int
    count: int  # type: ignore[assignment]  # a tuple's method of this name is not missed here
    slot: int | None


class Round(NamedTuple):
    """Take the state out of ``slot``, make the moves, and one is at ``step``, which is pulled back."""

    step: int
    slot: int
    moves: tuple[Move, ...]


@final
@dataclass(frozen=True)
class Schedule:
    """One round for each step of a run, from the last to the first. ``str`` draws it.

    ``held`` says at which steps the states in the slots are, to begin with: that of step 0 in slot 0, unless
    the schedule goes on from an `Online` one.
    """

    length: int
    slots: int
    rounds: tuple[Round, ...]
    held: tuple[int, ...] = (0,)

    @property
    def forward_steps(self) -> int:
        """Steps that are run without being pulled back."""
        return sum(move.count for each in self.rounds for move in each.moves)

    def __str__(self) -> str:
        """Training goes to the right: ``o`` is a state kept, ``-`` a step run, ``<`` one pulled back."""
        lines = [f"{self.length} steps in {self.slots} slots: {self.forward_steps} forward steps"]
        for each in self.rounds:
            line = [" "] * self.length
            for move in each.moves:
                line[move.start : move.start + move.count] = "-" * move.count
                if move.slot is not None:
                    line[move.start] = "o"
            line[each.step] = "<"
            lines.append("".join(line).rstrip())
        return "\n".join(lines)


def reach(slots: int, repeats: int) -> int:
    """β(c, r): the longest run that c slots pull back without running any step more than r times."""
    return comb(slots + repeats, slots) if repeats >= 0 else 0


def repeats(length: int, slots: int) -> int:
    """r: how often a step is run at most."""
    found = 0
    while reach(slots, found) < length:
        found += 1
    return found


def forward_steps(length: int, slots: int) -> int:
    """t(l, c), by the closed form.

    Raises:
        ArgumentError: unless both are positive.
    """
    _check(length, slots)
    r = repeats(length, slots)
    return r * length - reach(slots + 1, r - 1)


def split(length: int, slots: int) -> int:
    """The least m that is best: both parts keep within their repeats, r − 1 and r."""
    r = repeats(length, slots)
    return max(1, reach(slots, r - 2), length - reach(slots - 1, r))


def schedule(length: int, slots: int) -> Schedule:
    """The schedule with the fewest forward steps.

    Raises:
        ArgumentError: unless both numbers are positive.
    """
    _check(length, slots)
    return Schedule(length, slots, tuple(_rounds((0,), length, slots)))


def _rounds(held: tuple[int, ...], length: int, slots: int) -> Iterator[Round]:
    """Pull back the steps before ``length``, with states of these steps in the first slots."""
    for slot in reversed(range(len(held))):
        yield from _part(slot, held[slot], length, slots - slot)
        length = held[slot]


def _part(slot: int, start: int, stop: int, free: int) -> Iterator[Round]:
    """Pull back the steps from ``start`` on; its state is in a slot, the lowest of those that are free."""
    # A stack of parts that are still to do; moves on the way to the last of them are made in one round.
    todo, origin, moves = [(slot, start, stop, free)], slot, list[Move]()
    while todo:
        slot, start, stop, free = todo.pop()
        if not moves:
            origin = slot
        length = stop - start
        if length > 1 and free > 1:
            m = split(length, free)
            moves.append(Move(start, m, slot if moves else None))
            todo += [(slot, start, start + m, free), (slot + 1, start + m, stop, free - 1)]
            continue
        if length > 1:
            moves.append(Move(start, length - 1, slot if moves else None))
            todo.append((slot, start, stop - 1, free))
        yield Round(stop - 1, origin, tuple(moves))
        moves = []


@final
@dataclass
class Online:
    """Where to put states while one does not know how long the run will be.

    A state makes room if a later one is of a higher level; if there is none such, the newest gives up its
    place, and what comes there is one level higher. No step is then run more often than with a schedule for a
    known length (Wang, Moin and Iaccarino 2009, algorithm 2).
    """

    slots: int
    held: list[tuple[int, float]] = field(default_factory=list)
    """Step and level of each state that is held, in the order of time."""

    def __post_init__(self) -> None:
        _check(1, self.slots)

    def visit(self, step: int) -> int | None:
        """Where the state of this step is to be put: the number of the state that it replaces, if any.

        To be called for every step in turn. The place is a position in `held`; states behind it move up.
        """
        if len(self.held) < self.slots:
            self.held.append((step, 0 if self.held else inf))
            return len(self.held) - 1
        highest = -1.0
        for place in reversed(range(1, len(self.held))):
            if self.held[place][1] < highest:
                del self.held[place]
                self.held.append((step, 0))
                return place
            highest = max(highest, self.held[place][1])
        if self.slots == 1 or self.held[-1][0] != step - 1:
            return None
        self.held[-1] = (step, self.held[-1][1] + 1)
        return len(self.held) - 1

    def schedule(self, length: int) -> Schedule:
        """How to go back, now that the run has ended."""
        held = tuple(step for step, _ in self.held if step < length)
        return Schedule(length, self.slots, tuple(_rounds(held, length, self.slots)), held)


def _check(length: int, slots: int) -> None:
    for name, value in (("length", length), ("slots", slots)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} = {value!r}; it is a positive integer")
