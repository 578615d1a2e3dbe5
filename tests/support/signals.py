"""Signals that come at a chosen line of this library."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import hypergrad

PACKAGES = tuple(
    str(Path(hypergrad.__file__).parents[1] / part) + os.sep
    for part in ("hypergrad", "backends", "reference")
)


@contextmanager
def at_line(number: int, *signals: int, apart: int = 0):
    """Raise the signals when that many lines of this library have run, with so many lines between them.

    Yields a list, which at the end holds the number of lines.
    """
    due = {number + k * apart: name for k, name in enumerate(signals)}
    lines = [0]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGES):
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] in due:
                signal.raise_signal(due[lines[0]])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def count_lines(f: Callable[[], object]) -> int:
    """The number of lines of this library that a call runs."""
    with at_line(-1) as lines:
        f()
    return lines[0]


def fresh(f: Callable[..., object], *arguments: object) -> None:
    """Call a function of a test module in a new process, which may fork: no library has threads in it."""
    process = multiprocessing.get_context("spawn").Process(target=f, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def in_a_child(f: Callable[[], object], kill_after: float | None = None) -> int:
    """Call a function in a forked process, and return its exit status: negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            f()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
