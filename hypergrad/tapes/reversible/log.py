"""What the pools of a reversible run gave away: digits, two to a byte, for all parameters at once."""

from __future__ import annotations

from typing import Any, NamedTuple, final

from hypergrad.backend import Array, Backend
from hypergrad.tapes.reversible.fixedpoint import DIGIT, SPILLS, WORD, FixedPoint, Ratio, is_full
from hypergrad.tapes.reversible.integers import Integers

EACH = WORD // DIGIT
"""Digits in a word."""


@final
class Log(NamedTuple):
    """Words, in each of which the first digit is the lower one, and how many digits there are."""

    words: Any
    count: Any

    @classmethod
    def begin(cls, backend: Backend, at: Integers, words: int) -> Log:
        """An empty one, with room for so many words."""
        like = [backend.cast(pool, f"uint{WORD}") for pool in at.pool]
        return cls(backend.empty_rows(like, words), at.top)

    @property
    def length(self) -> Any:
        """The number of words."""
        return (self.count + EACH - 1) // EACH

    def take_in(self, backend: Backend, form: FixedPoint, at: Integers, ratio: Ratio) -> tuple[Integers, Log]:
        """Make room in the pools for one more step."""

        def spill(carry: tuple[Integers, Log]) -> tuple[Integers, Log]:
            at, log = carry
            digits = [form.digit(pool) for pool in at.pool]
            for k, pool in enumerate(at.pool):
                at.pool[k] = form.spill(pool)
            return at._replace(top=at.top >> DIGIT), log._with(backend, digits)

        made: tuple[Integers, Log] = backend.while_loop(
            lambda carry: is_full(carry[0].top, ratio), spill, (at, self), SPILLS
        )
        return made

    def give_back(
        self, backend: Backend, form: FixedPoint, at: Integers, spilled: Any
    ) -> tuple[Integers, Log]:
        """Put so many digits back into the pools."""

        def refill(carry: tuple[Integers, Log, Any]) -> tuple[Integers, Log, Any]:
            at, log, left = carry
            place, second = divmod(log.count - 1, EACH)
            words = backend.take(log.words, place)
            for k, (pool, word) in enumerate(zip(at.pool, words, strict=True)):
                at.pool[k] = form.refill(pool, (word >> DIGIT * second) & (2**DIGIT - 1))
            return at, Log(log.words, log.count - 1), left - 1

        at, log, _ = backend.while_loop(lambda carry: carry[2] > 0, refill, (at, self, spilled), SPILLS)
        return at, log

    def _with(self, backend: Backend, digits: list[Array]) -> Log:
        place, second = divmod(self.count, EACH)
        if backend.compiles or second:
            # A first digit takes the place of whatever there is; a second one is put beside it.
            old = backend.take(self.words, place)
            pairs = zip(old, digits, strict=True)
            digits = [backend.cast(a * second + (b << DIGIT * second), f"uint{WORD}") for a, b in pairs]
        return Log(backend.set_row(self.words, place, digits), self.count + 1)
