"""The log of a reversible run: the digits from its pools, two to a byte, for all parameters together."""

from __future__ import annotations

from typing import Any, NamedTuple, final

from hypergrad.backend import Array, Backend
from hypergrad.tapes.reversible.fixedpoint import DIGIT, SPILLS, WORD, FixedPoint, Ratio, is_full
from hypergrad.tapes.reversible.integers import Integers

EACH = WORD // DIGIT
"""Digits in a word."""


@final
class Log(NamedTuple):
    """Words of digits, the first digit in the low bits, and the number of digits."""

    words: Any
    count: Any

    @classmethod
    def begin(cls, backend: Backend, at: Integers, words: int) -> Log:
        """Return an empty log with room for so many words."""
        like = [backend.cast(pool, f"uint{WORD}") for pool in at.pool]
        return cls(backend.empty_rows(like, words), at.top)

    @property
    def length(self) -> Any:
        """The number of words in use."""
        return (self.count + EACH - 1) // EACH

    def take_in(self, backend: Backend, form: FixedPoint, at: Integers, ratio: Ratio) -> tuple[Integers, Log]:
        """Move digits from the pools to the log, so that the pools have room for one more step."""

        def spill(carry: tuple[Integers, Log]) -> tuple[Integers, Log]:
            at, log = carry
            digits = [form.digit(pool) for pool in at.pool]
            for k, pool in enumerate(at.pool):
                at.pool[k] = form.spill(pool)
            return at._replace(top=at.top >> DIGIT), log._appended(backend, digits)

        result: tuple[Integers, Log] = backend.while_loop(
            lambda carry: is_full(carry[0].top, ratio), spill, (at, self), SPILLS
        )
        return result

    def give_back(
        self, backend: Backend, form: FixedPoint, at: Integers, spilled: Any
    ) -> tuple[Integers, Log]:
        """Move the last ``spilled`` digits back to the pools."""

        def refill(carry: tuple[Integers, Log, Any]) -> tuple[Integers, Log, Any]:
            at, log, left = carry
            place, second = divmod(log.count - 1, EACH)
            words = backend.take(log.words, place)
            for k, (pool, word) in enumerate(zip(at.pool, words, strict=True)):
                at.pool[k] = form.refill(pool, (word >> DIGIT * second) & (2**DIGIT - 1))
            return at, Log(log.words, log.count - 1), left - 1

        at, log, _ = backend.while_loop(lambda carry: carry[2] > 0, refill, (at, self, spilled), SPILLS)
        return at, log

    def _appended(self, backend: Backend, digits: list[Array]) -> Log:
        place, second = divmod(self.count, EACH)
        if backend.compiles or second:
            # The first digit of a word overwrites the word; the second is added in its high bits.
            old = backend.take(self.words, place)
            pairs = zip(old, digits, strict=True)
            digits = [backend.cast(a * second + (b << DIGIT * second), f"uint{WORD}") for a, b in pairs]
        return Log(backend.set_row(self.words, place, digits), self.count + 1)
