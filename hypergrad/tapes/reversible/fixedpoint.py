r"""Numbers in fixed point, on which training steps can be taken back exactly.

A float forgets: (x + y) − y is not x. An integer does not, and a number x is kept as the one next to 2^F x.
Adding is undone by subtracting; what is left is the momentum μ b, which shrinks b and so drops bits of it.

With μ = n/d the quotient b div d is multiplied by n, and the remainder b mod d goes into a *pool* i, an
integer that takes in digits of base d and gives out digits of base n (Maclaurin et al. 2015, algorithm 3):

    i ← i d + b mod d,    b ← (b div d) n + i mod n,    i ← i div n

and each line can be read backwards. The pool grows by log2(d/n) bits a step, which is what must be
remembered, and no more. It is kept in 16 bits, and widened for the step; when it might not fit any more, its
last four bits go to a log, two such digits to a byte, for all parameters at once. What is left is at least
2^12, so that little is lost by rounding up: a pool of N values can hold ⌈N d/n⌉ after a step.

A momentum that is no such fraction, one that is learned for instance, is n/d rounded down times 1 + ε, and
b ↦ b + round(ε b) with 0 ≤ ε < ½ leaves no two integers in one place: it is undone by looking for the one.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple, final

from hypergrad.backend import Array, Backend
from hypergrad.errors import ArgumentError

DENOMINATOR = 1024
"""The largest d: as many units in the last place are lost to the pool in a step."""

POOL, EMPTY = 16, -(2**15)
"""Bits of a pool between two steps, and how 0 is stored in them: i as i − 2^15, which every framework has."""

DIGIT, WORD = 4, 8
"""Bits that a pool gives to the log at a time, and those of the words in which they are kept there."""

SPILLS = 3
"""Digits at most that make room for a step: d/n is 2^10 at most, and 2^16 / 16^3 times that fits."""


class Ratio(NamedTuple):
    """μ = (1 + ε) n / d."""

    n: Any
    d: int
    eps: Any

    @classmethod
    def of(cls, backend: Backend, momentum: Any, dtype: str) -> Ratio:
        """The ratio of a number, as good as it gets, or of a traced one, with n an integer of this dtype.

        Raises:
            ArgumentError: if the momentum is too small, or 1 and more.
        """
        if backend.owns(momentum) and not backend.compiles:
            momentum = float(backend.to_numpy(momentum))
        if isinstance(momentum, float | int):
            if not 1 / DENOMINATOR <= momentum < 1:
                raise ArgumentError(
                    f"Reversible: a momentum of {momentum} cannot be taken back, since a step forgets nearly "
                    "all of its velocity: take hg.Binomial or hg.States"
                )
            near = Fraction(momentum).limit_denominator(DENOMINATOR)
            if abs(float(near) - momentum) <= 2**-50:
                return cls(near.numerator, near.denominator, 0.0)
            n = int(momentum * DENOMINATOR)
            return cls(n, DENOMINATOR, momentum * DENOMINATOR / n - 1)
        whole = backend.xp.maximum(momentum * DENOMINATOR // 1, 1.0)
        return cls(backend.cast(whole, dtype), DENOMINATOR, momentum * DENOMINATOR / whole - 1)


@final
class FixedPoint(NamedTuple):
    """Integers of so many ``bits``, ``fraction`` of them after the point."""

    backend: Backend
    bits: int
    fraction: int

    @property
    def dtype(self) -> str:
        return f"int{self.bits}"

    @property
    def largest(self) -> float:
        """The largest number that fits."""
        return float(2 ** (self.bits - 1 - self.fraction))

    def fixed(self, x: Array) -> Array:
        """The integer next to 2^F x."""
        wide = x if self.backend.describe(x).itemsize >= 4 else self.backend.cast(x, "float32")
        return self.backend.cast(self.backend.xp.round(wide * float(2**self.fraction)), self.dtype)

    def wide(self, x: Array) -> str:
        """The kind of float in which numbers of the leaf x are taken to integers and back."""
        return f"float{max(self.bits, 8 * self.backend.describe(x).itemsize)}"

    def number(self, x: Array, dtype: str) -> Array:
        """2^−F x, as a float."""
        return self.backend.cast(x, dtype) * float(2.0**-self.fraction)

    def split(self, x: Array, dtype: str) -> tuple[Array, Array]:
        """An integer as the float next to 2^−F x, and the few bits by which that is not it."""
        near = self.number(x, dtype)
        return near, self.backend.cast(x - self.fixed(near), f"int{self.bits // 4}")

    def joined(self, near: Array, rest: Array) -> Array:
        """The integer again."""
        return self.fixed(near) + self.backend.cast(rest, self.dtype)

    def misfits(self, x: Array, y: Array | None = None) -> Any:
        """How many of the numbers x and y, or of their sums, do not fit?"""
        xp, most = self.backend.xp, self.largest * (1 - 2.0**-20)
        size = xp.abs(x) if y is None else xp.abs(x) + xp.abs(y)
        return xp.sum(xp.where(size < most, 0, 1))

    def shrink(self, b: Array, pool: Array, ratio: Ratio) -> tuple[Array, Array]:
        """Multiply: b ↦ μ b, with what is lost taken into the pool."""
        n, d, eps = ratio
        b, digit = _divided(b, d)
        pool, other = _divided(self._opened(pool) * d + digit, n)
        return self._stretch(b * n + other, eps), self._closed(pool)

    def grow(self, b: Array, pool: Array, ratio: Ratio) -> tuple[Array, Array]:
        """The same backwards."""
        n, d, eps = ratio
        b, digit = _divided(self._relax(b, eps), n)
        pool, other = _divided(self._opened(pool) * n + digit, d)
        return b * d + other, self._closed(pool)

    def empty(self, like: Array) -> Array:
        """A pool with nothing in it."""
        return self.backend.cast(self.backend.xp.zeros_like(like), f"int{POOL}") + EMPTY

    def _opened(self, pool: Array) -> Array:
        return self.backend.cast(pool, self.dtype) - EMPTY

    def _closed(self, pool: Array) -> Array:
        return self.backend.cast(pool + EMPTY, f"int{POOL}")

    def digit(self, pool: Array) -> Array:
        """The last digit of a pool."""
        return self.backend.cast(pool & (2**DIGIT - 1), f"uint{WORD}")

    def spill(self, pool: Array) -> Array:
        """A pool without its last digit: i ↦ i div 2^4."""
        return (pool >> DIGIT) + (EMPTY - (EMPTY >> DIGIT))

    def refill(self, pool: Array, digit: Array) -> Array:
        """The same backwards."""
        high = (pool - (EMPTY - (EMPTY >> DIGIT))) << DIGIT
        return high + self.backend.cast(digit, f"int{POOL}")

    def _part(self, b: Array, eps: Any) -> Array:
        wide = f"float{self.bits}"
        return self.backend.cast(self.backend.xp.round(self.backend.cast(b, wide) * eps), self.dtype)

    def _stretch(self, b: Array, eps: Any) -> Array:
        return b if isinstance(eps, float) and eps == 0 else b + self._part(b, eps)

    def _relax(self, b: Array, eps: Any) -> Array:
        if isinstance(eps, float) and eps == 0:
            return b
        x = b - self._part(b, eps / (1 + eps))
        for _ in range(3):  # within two units by now, and each time nearer
            x = x + (b - self._stretch(x, eps))
        return x


def _divided(x: Array, by: Any) -> tuple[Array, Array]:
    """Quotient and remainder, in one division."""
    quotient = x // by
    return quotient, x - quotient * by


def pooled(top: Any, ratio: Ratio) -> Any:
    """The most that a pool can hold after a step, if it held ``top`` at most before."""
    return (top * ratio.d + ratio.d - 1) // ratio.n


def is_full(top: Any, ratio: Ratio) -> Any:
    """Might a pool that holds ``top`` at most not fit any more after a step?"""
    return pooled(top, ratio) >= 2**POOL


def digits(ratio: Ratio, steps: int) -> int:
    """How many digits a pool gives away in so many steps, from empty."""
    top, count = 0, 0
    for _ in range(steps):
        while is_full(top, ratio):
            top, count = top >> DIGIT, count + 1
        top = pooled(top, ratio)
    return count
