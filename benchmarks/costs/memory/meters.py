"""The peak of a process's memory, by the operating system or by tracemalloc."""

import ctypes
import resource
import sys
import tracemalloc


class Resident:
    """The largest that the process has been, in bytes, each large array giving back its pages when it goes.

    What glibc keeps for later, and breaks into pieces, was 7 % of a hundred states.
    """

    def __init__(self) -> None:
        self._limit(1 << 16, 1 << 16)

    def __call__(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def stop(self) -> None:
        # What glibc comes to by itself, with large arrays: programs are faster so.
        self._limit(1 << 25, 1 << 26)

    @staticmethod
    def _limit(mapped: int, trimmed: int) -> None:
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-3, mapped)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, trimmed)  # M_TRIM_THRESHOLD


class Traced:
    """The most that was allocated, as tracemalloc sees it, since the last time. That slows programs down."""

    def __init__(self) -> None:
        tracemalloc.start()

    def __call__(self) -> int:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return most

    def stop(self) -> None:
        tracemalloc.stop()
