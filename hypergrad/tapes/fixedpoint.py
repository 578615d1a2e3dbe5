r"""Numbers in fixed point, on which training steps can be taken back exactly.

A float forgets: (x + y) − y is not x. An integer does not, and a number x is kept as the one next to 2^F x.
Adding is undone by subtracting; what is left is the momentum μ b, which shrinks b and so drops bits of it.

With μ = n/d the quotient b div d is multiplied by n, and the remainder b mod d goes into a *pool* i, an
integer that takes in digits of base d and gives out digits of base n (Maclaurin et al. 2015, algorithm 3):

    i ← i d + b mod d,    b ← (b div d) n + i mod n,    i ← i div n

and each line can be read backwards. The pool grows by log2(d/n) bits a step, which is what must be
remembered, and no more. When it is nearly full its lower half goes to a log, for all parameters at once.

A momentum that is no such fraction, one that is learned for instance, is n/d rounded down times 1 + ε, and
b ↦ b + round(ε b) with 0 ≤ ε < ½ leaves no two integers in one place: it is undone by looking for the one.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple, final

from hypergrad.backend import Array, Backend, Tree
from hypergrad.errors import ArgumentError

DENOMINATOR = 1024
"""The largest d: as many units in the last place are lost to the pool in a step."""


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
    def word(self) -> int:
        """Bits that the pool gives to the log at a time."""
        return self.bits // 2

    @property
    def room(self) -> int:
        """What the pool holds is below this."""
        return int(2 ** (self.bits - 2))

    @property
    def largest(self) -> float:
        """The largest number that fits."""
        return float(2 ** (self.bits - 1 - self.fraction))

    def fixed(self, x: Array) -> Array:
        """The integer next to 2^F x."""
        wide = x if self.backend.describe(x).itemsize >= 4 else self.backend.cast(x, "float32")
        return self.backend.cast(self.backend.xp.round(wide * float(2**self.fraction)), self.dtype)

    def number(self, x: Array, like: Array) -> Array:
        """2^−F x, as a float."""
        dtype = self.backend.describe(like).dtype
        wide = dtype if self.backend.describe(like).itemsize >= 4 else "float32"
        return self.backend.cast(self.backend.cast(x, wide) * float(2.0**-self.fraction), dtype)

    def overflows(self, x: Tree, y: Tree) -> Any:
        """The first leaf in which numbers x and y, or their sum, do not fit; −1 if there is none."""
        xp, found = self.backend.xp, -1
        limit = self.largest * (1 - 2.0**-20)
        pairs = zip(self.backend.flatten(x)[0], self.backend.flatten(y)[0], strict=True)
        for i, (a, b) in reversed(list(enumerate(pairs))):
            found = xp.where(xp.all(xp.abs(a) + xp.abs(b) < limit), found, i)
        return found

    def shrink(self, b: Array, pool: Array, ratio: Ratio) -> tuple[Array, Array]:
        """Multiply: b ↦ μ b, with what is lost taken into the pool."""
        n, d, eps = ratio
        b, digit = _divided(b, d)
        pool, other = _divided(pool * d + digit, n)
        return self._stretch(b * n + other, eps), pool

    def grow(self, b: Array, pool: Array, ratio: Ratio) -> tuple[Array, Array]:
        """The same backwards."""
        n, d, eps = ratio
        b, digit = _divided(self._relax(b, eps), n)
        pool, other = _divided(pool * n + digit, d)
        return b * d + other, pool

    def spill(self, pool: Array) -> tuple[Array, Array]:
        """The pool without its lower half, and that."""
        half = 2 ** (self.word - 1)
        high = pool >> self.word
        return high, self.backend.cast(pool - (high << self.word) - half, f"int{self.word}")

    def refill(self, pool: Array, low: Array) -> Array:
        """The same backwards."""
        return (pool << self.word) + (self.backend.cast(low, self.dtype) + 2 ** (self.word - 1))

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
