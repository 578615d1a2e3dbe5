r"""Fixed-point numbers, on which training steps can be undone exactly.

Floats lose bits: (x + y) − y is not x. Integers do not, so a number x is stored as the integer nearest to
2^F x. Subtraction undoes addition. What remains is b ↦ μ b, which shrinks b and so drops bits of it.

With μ = n/d the quotient b div d is multiplied by n, and the remainder b mod d goes into a *pool* i, an
integer that takes in digits of base d and gives out digits of base n (Maclaurin et al. 2015, algorithm 3):

    i ← i d + b mod d,    b ← (b div d) n + i mod n,    i ← i div n

and each line can be inverted. The pool grows by log2(d/n) bits a step, which is exactly the information that
must be stored. It is kept in 16 bits, and widened for the step. When it might overflow them, its last four
bits go to a log, two such digits to a byte, for the pools of all parameters together. The bound on a pool is
then still 2^12 or more, so little is lost by rounding it up: a pool of N possible values has ⌈N d/n⌉ after
a step.

A momentum that is no such fraction, for instance a learned one, is n/d rounded down times 1 + ε. With
0 ≤ ε < ½ the map b ↦ b + round(ε b) takes no two integers to the same one, and is inverted by iteration.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple, final

from hypergrad.backend import Array, Backend
from hypergrad.errors import ArgumentError

DENOMINATOR = 1024
"""The largest d; a step moves fewer than d units in the last place of b to the pool."""

POOL, EMPTY = 16, -(2**15)
"""Bits of a pool between two steps, and how 0 is stored: i as i − 2^15, in the int16 of every framework."""

DIGIT, WORD = 4, 8
"""Bits of a digit, which a pool moves to the log at a time, and bits of a word of the log."""

SPILLS = 3
"""The most digits that must be moved before a step: d/n is at most 2^10, and 2^16 / 16^3 times that fits."""


class Ratio(NamedTuple):
    """μ = (1 + ε) n / d."""

    n: Any
    d: int
    eps: Any

    @classmethod
    def of(cls, backend: Backend, momentum: Any, dtype: str) -> Ratio:
        """Return the ratio of a number, or of a traced one, for which n is an integer of this dtype.

        Raises:
            ArgumentError: if the momentum is too small, or 1 or more.
        """
        if backend.owns(momentum) and not backend.compiles:
            momentum = float(backend.to_numpy(momentum))
        if isinstance(momentum, float | int):
            if not 1 / DENOMINATOR <= momentum < 1:
                raise ArgumentError(
                    f"Reversible: a step with a momentum of {momentum} cannot be undone, because it loses "
                    "nearly all of the velocity: use hg.Binomial or hg.States"
                )
            near = Fraction(momentum).limit_denominator(DENOMINATOR)
            if abs(float(near) - momentum) <= 2**-50:
                return cls(near.numerator, near.denominator, 0.0)
            n = int(momentum * DENOMINATOR)
            return cls(n, DENOMINATOR, momentum * DENOMINATOR / n - 1)
        n = backend.xp.maximum(momentum * DENOMINATOR // 1, 1.0)
        return cls(backend.cast(n, dtype), DENOMINATOR, momentum * DENOMINATOR / n - 1)


@final
class FixedPoint(NamedTuple):
    """Fixed point in integers of ``bits`` bits, ``fraction`` of them after the point."""

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
        """Return the integer nearest to 2^F x."""
        wide = x if self.backend.describe(x).itemsize >= 4 else self.backend.cast(x, "float32")
        return self.backend.cast(self.backend.xp.round(wide * float(2**self.fraction)), self.dtype)

    def wide(self, x: Array) -> str:
        """Return the float dtype in which numbers of the leaf x are converted to integers and back."""
        return f"float{max(self.bits, 8 * self.backend.describe(x).itemsize)}"

    def number(self, x: Array, dtype: str) -> Array:
        """Return 2^−F x as a float."""
        return self.backend.cast(x, dtype) * float(2.0**-self.fraction)

    def split(self, x: Array, dtype: str) -> tuple[Array, Array]:
        """Split an integer x into the float nearest to 2^−F x and a small integer, the rest of x."""
        near = self.number(x, dtype)
        return near, self.backend.cast(x - self.fixed(near), f"int{self.bits // 4}")

    def joined(self, near: Array, rest: Array) -> Array:
        """Undo `split`: return the integer."""
        return self.fixed(near) + self.backend.cast(rest, self.dtype)

    def misfits(self, x: Array, y: Array | None = None) -> Any:
        """Count the elements of |x|, or of |x| + |y|, that do not fit."""
        xp, most = self.backend.xp, self.largest * (1 - 2.0**-20)
        size = xp.abs(x) if y is None else xp.abs(x) + xp.abs(y)
        return xp.sum(xp.where(size < most, 0, 1))

    def shrink(self, b: Array, pool: Array, ratio: Ratio) -> tuple[Array, Array]:
        """Multiply, b ↦ μ b, and move the bits that b loses into the pool."""
        n, d, eps = ratio
        b, digit = _divided(b, d)
        pool, other = _divided(self._unpacked(pool) * d + digit, n)
        return self._stretch(b * n + other, eps), self._packed(pool)

    def grow(self, b: Array, pool: Array, ratio: Ratio) -> tuple[Array, Array]:
        """Undo `shrink`."""
        n, d, eps = ratio
        b, digit = _divided(self._unstretch(b, eps), n)
        pool, other = _divided(self._unpacked(pool) * n + digit, d)
        return b * d + other, self._packed(pool)

    def empty(self, like: Array) -> Array:
        """Return an empty pool."""
        return self.backend.cast(self.backend.xp.zeros_like(like), f"int{POOL}") + EMPTY

    def _unpacked(self, pool: Array) -> Array:
        return self.backend.cast(pool, self.dtype) - EMPTY

    def _packed(self, pool: Array) -> Array:
        return self.backend.cast(pool + EMPTY, f"int{POOL}")

    def digit(self, pool: Array) -> Array:
        """Return the last digit of a pool."""
        return self.backend.cast(pool & (2**DIGIT - 1), f"uint{WORD}")

    def spill(self, pool: Array) -> Array:
        """Return a pool without its last digit: i ↦ i div 2^4."""
        return (pool >> DIGIT) + (EMPTY - (EMPTY >> DIGIT))

    def refill(self, pool: Array, digit: Array) -> Array:
        """Undo `spill`."""
        high = (pool - (EMPTY - (EMPTY >> DIGIT))) << DIGIT
        return high + self.backend.cast(digit, f"int{POOL}")

    def _rounded_share(self, b: Array, eps: Any) -> Array:
        wide = f"float{self.bits}"
        return self.backend.cast(self.backend.xp.round(self.backend.cast(b, wide) * eps), self.dtype)

    def _stretch(self, b: Array, eps: Any) -> Array:
        return b if isinstance(eps, float) and eps == 0 else b + self._rounded_share(b, eps)

    def _unstretch(self, b: Array, eps: Any) -> Array:
        if isinstance(eps, float) and eps == 0:
            return b
        x = b - self._rounded_share(b, eps / (1 + eps))
        for _ in range(3):  # x is within two units of the solution, and nearer after each pass
            x = x + (b - self._stretch(x, eps))
        return x


def _divided(x: Array, by: Any) -> tuple[Array, Array]:
    """Return quotient and remainder, with a single division."""
    quotient = x // by
    return quotient, x - quotient * by


def pooled(top: Any, ratio: Ratio) -> Any:
    """Return the largest value of a pool after a step, if it was at most ``top`` before."""
    return (top * ratio.d + ratio.d - 1) // ratio.n


def is_full(top: Any, ratio: Ratio) -> Any:
    """Return whether a pool of at most ``top`` might overflow in a step."""
    return pooled(top, ratio) >= 2**POOL


def digits(ratio: Ratio, steps: int) -> int:
    """Return how many digits a pool, empty at first, moves to the log in so many steps."""
    top, count = 0, 0
    for _ in range(steps):
        while is_full(top, ratio):
            top, count = top >> DIGIT, count + 1
        top = pooled(top, ratio)
    return count
