"""Signals that wait until a step is done, so that none leaves half of it behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, final

from hypergrad.errors import TornStateError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ended(BaseException):
    """A signal has come, for which a run ends. Raised and caught inside of it.

    Attributes:
        run: as that of a `HypergradError`.
    """

    run: Any = None


@final
class Interrupts:
    """Ctrl-C and SIGTERM, held back while a block of a state's owner is under way.

    At the end of the block they are given to the handlers that were there before, which are put back. A
    second Ctrl-C does not wait: it goes to the handler from before at once, and if that raises, the state is
    *torn*, and `check` refuses to go on with it. Blocks may be nested; the outermost one counts.

    Python runs handlers in the main thread alone, so in other threads there is nothing to hold back.
    """

    def __init__(self, saves: bool = False) -> None:
        self.saves = saves
        """Is something saved at the end of a block? Only then is a SIGTERM held that ends the process."""
        self.torn = False
        self._before: dict[int, Any] = {}
        """The handlers of the signals that are held, while they are."""
        self._pending: list[int] = []
        self._blocks, self._open = 0, False

    @property
    def pending(self) -> bool:
        """Has a signal come that waits for the end of the block?"""
        return bool(self._pending)

    def check(self) -> None:
        """Refuse a torn state.

        Raises:
            TornStateError: if a block was ended by a second Ctrl-C.
        """
        if self.torn:
            raise TornStateError(
                "a step was ended by a second Ctrl-C, and its state may be half of the one before and half "
                "of the one after. Load a state that was saved, or make the tuner anew"
            )

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        if not self._blocks:
            self._pending = []
            self._install(signal.SIGINT)
            if self.saves or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                self._install(signal.SIGTERM)
        self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._blocks == 1:
            self._close()
        elif self._blocks:
            self._blocks -= 1

    def _install(self, number: signal.Signals) -> None:
        before = signal.getsignal(number)
        # One that is ignored stays so. None is a handler of another language.
        if before not in (signal.SIG_IGN, None, self._hold):
            self._before[number] = before
            signal.signal(number, self._hold)

    def _close(self) -> None:
        """Put the handlers back, and give them what has come.

        From the first line on our handler hands on what comes. So it does no harm if a handler that raises
        keeps it from being put back: the next block does that.
        """
        self._blocks = 0
        try:
            self._put_back(signal.SIGTERM)
        finally:
            self._put_back(signal.SIGINT)

    def _put_back(self, number: signal.Signals) -> None:
        if number in self._before:
            signal.signal(number, self._before[number])
            del self._before[number]
            if number in self._pending:
                self._pending.remove(number)
                signal.raise_signal(number)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Within this part of a block nothing is under way, and a signal ends it.

        Raises:
            Ended: when a signal comes, or has come, which then waits for the end of the block.
        """
        if self._pending:
            raise Ended
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if not self._blocks:
            self._hand_on(number, frame)
        elif number == signal.SIGINT and number in self._pending:
            self.torn = True
            self._close()  # here, since what is raised may come in the middle of the block's own end
            self.torn = False
        else:
            self._pending.append(number)
            if self._open:
                self._open = False
                raise Ended

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            signal.raise_signal(number)
