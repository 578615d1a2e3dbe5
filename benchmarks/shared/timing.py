"""Times that can be compared: programs run in turn, round after round."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

Program = Callable[[], Any]


def clock(program: Program, wait: Callable[[Any], Any] = lambda result: None) -> float:
    """Seconds of one run, until ``wait`` has what it returned."""
    begin = time.perf_counter()
    wait(program())
    return time.perf_counter() - begin


def rounds(
    programs: Sequence[Program],
    repeats: int,
    wait: Callable[[Any], Any],
    enough: Callable[[list[float]], bool] = lambda times: False,
) -> list[list[float]]:
    """Seconds of each program, once in each round until it has ``enough``.

    Rounds have an order of their own, A B C … B C A …: what ran before leaves its traces in caches and in the
    allocator.
    """
    times: list[list[float]] = [[] for _ in programs]
    order, draw = list(range(len(programs))), random.Random(0)
    for _ in range(repeats):
        draw.shuffle(order)
        for k in order:
            if not enough(times[k]):
                times[k].append(clock(programs[k], wait))
    return times
