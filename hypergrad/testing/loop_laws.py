"""Laws of loops: `scan`, `while_loop`, `repeat`, `cond`, and the rows that they produce."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from hypergrad.backend import Backend
from hypergrad.testing.calculus import value_and_grad
from hypergrad.testing.problems import close


def loops_are_loops(backend: Backend) -> None:
    """``scan`` runs both ways, over its own rows, and has derivatives; ``while_loop`` stops in time."""
    start = backend.asarray(np.array(1.0))
    items = backend.stack([backend.asarray(np.array(float(k))) for k in range(5)])

    def body(carry: Any, k: Any, _: Any) -> Any:
        return 2.0 * carry + backend.take(items, k), carry

    end, rows = backend.scan(body, start, 5)
    close(backend, end, backend.asarray(np.array(58.0)))
    back, _ = backend.scan(lambda c, k, x: (2.0 * c + x, None), start, 5, xs=rows, reverse=True)
    # Carries 1, 2, 5, 12, 27, read from the last to the first.
    close(backend, back, backend.asarray(np.array(32.0 + 27 * 16 + 12 * 8 + 5 * 4 + 2 * 2 + 1)))
    stopped = backend.while_loop(lambda c: c < 20.0, lambda c: 3.0 * c, start, 100)
    close(backend, stopped, backend.asarray(np.array(27.0)))
    limited = backend.while_loop(lambda n: n[0] < 3, lambda n: (n[0] + 1, 3.0 * n[1]), (0, start), 3)
    close(backend, limited[1], backend.asarray(np.array(27.0)))
    _, slope = value_and_grad(
        backend, lambda s: backend.scan(lambda c, k, _: (c * c, None), s, 3)[0], 1.1 * start
    )
    close(backend, slope, backend.asarray(np.array(8 * 1.1**7)))
    empty, _ = backend.scan(body, start, 0)
    close(backend, empty, start)


def rows_are_collected(backend: Backend) -> None:
    """``repeat`` collects a row of each iteration; ``cond`` chooses; a compiled function gives the same."""

    def program(start: Any) -> Any:
        def body(carry: Any, k: Any) -> Any:
            return 2.0 * carry, {"before": carry, "k": k}, (carry, 7), carry < 10.0

        carry, rows, last, count = backend.repeat(body, start, 8)
        chosen = backend.cond(
            carry > 1.0, lambda: {"a": carry, "b": (carry,)}, lambda: {"a": start, "b": None}
        )
        return carry, backend.collect(rows), last, count, chosen

    start = backend.asarray(np.array(1.0))
    carry, rows, last, count, chosen = backend.compile(program)(start)
    rows = backend.collect([rows])
    before = [float(x) for x in rows["before"][0][:5]]
    assert (float(backend.to_numpy(carry)), int(count), int(last[1])) == (32.0, 5, 7)
    assert before == [1.0, 2.0, 4.0, 8.0, 16.0] and [int(k) for k in rows["k"][0][:5]] == [0, 1, 2, 3, 4]
    close(backend, (last[0], chosen["a"], chosen["b"][0]), (0.5 * carry, carry, carry))


def rows_can_be_set(backend: Backend) -> None:
    """``set_row`` fills ``empty_rows`` in any order, also in a loop, and ``take`` and ``dense`` read them."""

    def program(x: Any) -> Any:
        def body(items: Any, k: Any, _: Any) -> Any:
            return backend.set_row(items, 2 - k, {"x": k * x, "none": None}), None

        items, _ = backend.scan(body, backend.empty_rows({"x": x, "none": None}, 3), 3)
        items = backend.set_row(items, 1, {"x": 5.0 * x, "none": None})
        return [backend.take(items, k)["x"] for k in range(3)], backend.dense(items)["x"]

    x = backend.asarray(np.array([1.0, -2.0]))
    rows = [2.0 * x, 5.0 * x, 0.0 * x]
    close(backend, backend.compile(program)(x), (rows, backend.xp.stack(rows)))


def callbacks_get_values(backend: Backend) -> None:
    """``callback`` calls its listener once with the values, from a compiled function too."""
    received: list[float] = []

    def program(x: Any) -> Any:
        backend.callback(lambda value: received.append(float(value)), 2.0 * x)
        return 3.0 * x

    result = backend.compile(program)(backend.asarray(np.array(1.5)))
    assert backend.to_numpy(result) == 4.5
    deadline = time.monotonic() + 10.0  # a program on a device may call back later
    while not received and time.monotonic() < deadline:
        time.sleep(0.001)
    assert received == [3.0]


LOOP_LAWS = (loops_are_loops, rows_are_collected, rows_can_be_set, callbacks_get_values)
