r"""Binomial checkpointing: which states to keep, and which steps to run again, as plain data.

A run of l steps is pulled back from its last step to its first, and step k needs its state z_k. With room for
c states, z_0 included, advance m steps, store that state, pull back the l − m steps after it with c − 1
slots, and then the m steps before it with c slots:

    t(l, c) = min_m  m + t(m, c) + t(l − m, c − 1),    t(1, c) = 0
            = r l − β(c + 1, r − 1),                    β(c, r) = (c + r)! / (c! r!)

where r is the least number with l ≤ β(c, r): no step is run more than r times (Griewank and Walther 2000,
algorithm 799, whose closed form this is). The schedule is complete before the first array operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import comb, inf
from typing import NamedTuple, final

from hypergrad.errors import ArgumentError


class Move(NamedTuple):
    """Store the state of step ``start`` in ``slot``, if it is not ``None``, and advance ``count`` steps."""

    start: int
    count: int  # type: ignore[assignment]  # hides a tuple's method, which is not used
    slot: int | None


class Round(NamedTuple):
    """Load the state in ``slot``, make the moves, which lead to ``step``, and pull back through that step."""

    step: int
    slot: int
    moves: tuple[Move, ...]


@final
@dataclass(frozen=True)
class Schedule:
    """One round for each step of a run, from the last to the first. ``str`` draws it.

    ``held`` lists the steps whose states are in the slots at first: step 0 in slot 0, unless the schedule
    continues an `Online` one.
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
        """Draw training to the right: ``o`` is a stored state, ``-`` a step run, ``<`` a step pulled back."""
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
    """Return β(c, r): the longest run that c slots pull back without running any step more than r times."""
    return comb(slots + repeats, slots) if repeats >= 0 else 0


def repeats(length: int, slots: int) -> int:
    """Return r: how often a step is run at most."""
    r = 0
    while reach(slots, r) < length:
        r += 1
    return r


def forward_steps(length: int, slots: int) -> int:
    """Return t(l, c), by the closed form.

    Raises:
        ArgumentError: unless both are positive.
    """
    _check(length, slots)
    r = repeats(length, slots)
    return r * length - reach(slots + 1, r - 1)


def split(length: int, slots: int) -> int:
    """Return the least optimal m, for which both parts keep within their repeats, r − 1 and r."""
    r = repeats(length, slots)
    return max(1, reach(slots, r - 2), length - reach(slots - 1, r))


def schedule(length: int, slots: int) -> Schedule:
    """Return the schedule with the fewest forward steps.

    Raises:
        ArgumentError: unless both numbers are positive.
    """
    _check(length, slots)
    return Schedule(length, slots, tuple(_rounds((0,), length, slots)))


def _rounds(held: tuple[int, ...], length: int, slots: int) -> Iterator[Round]:
    """Pull back the steps before ``length``, with the states of the steps ``held`` in the first slots."""
    for slot in reversed(range(len(held))):
        yield from _part(slot, held[slot], length, slots - slot)
        length = held[slot]


def _part(slot: int, start: int, stop: int, free: int) -> Iterator[Round]:
    """Pull back the steps from ``start`` to ``stop``; the first state is in ``slot``, the lowest free one."""
    # A stack of parts still to be pulled back; the moves that lead to the last of them form one round.
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
    """Which states to keep while the length of the run is not known.

    Evict the newest checkpoint that has a later one of a higher level; if there is none, evict the newest of
    all, and give its successor the next higher level. No step is then run more often than with a schedule for
    a known length (Wang, Moin and Iaccarino 2009, algorithm 2).
    """

    slots: int
    held: list[tuple[int, float]] = field(default_factory=list)
    """Step and level of each checkpoint that is held, in the order of the steps."""

    def __post_init__(self) -> None:
        _check(1, self.slots)

    def visit(self, step: int) -> int | None:
        """Return where to put the state of this step, or ``None`` if it is not kept.

        Call it for every step in turn. The result is a position in `held`: that of the evicted checkpoint,
        or the next free one. Later checkpoints move up by one, and the new one comes last.
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
        """Return the schedule that pulls back a run which ended after ``length`` steps."""
        held = tuple(step for step, _ in self.held if step < length)
        return Schedule(length, self.slots, tuple(_rounds(held, length, self.slots)), held)


def _check(length: int, slots: int) -> None:
    for name, value in (("length", length), ("slots", slots)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} = {value!r}; it must be a positive integer")
