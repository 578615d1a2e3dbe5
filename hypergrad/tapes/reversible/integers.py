"""A step of momentum SGD in integers, there and back, one leaf after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from hypergrad.backend import Array, Backend, Scalar, Tree
from hypergrad.tapes.reversible.fixedpoint import FixedPoint, Ratio, pooled
from hypergrad.updates.base import is_off, resolve
from hypergrad.updates.sgd import SGD

Leaves = list[Array]

MULTIPLIERS = 1597334677, 1103515245
"""Odd numbers, one for each of two ways to scramble integers."""


class Integers(NamedTuple):
    """θ, b and the pool in integers, leaf by leaf, and the most that the pool may hold.

    On the way θ is in two parts: the floats at which the loss is taken, and ``rest``, the few bits by which
    they are not it. So there are no integers beside the floats.
    """

    params: Leaves
    rest: Leaves
    velocity: Leaves
    pool: Leaves
    top: Any


class Rates(NamedTuple):
    """The numbers of a step: b ← μ b + s (g + w θ), θ ← θ − η b, with s = 1 − δ."""

    lr: Scalar
    momentum: Scalar
    decay: Scalar = 0.0
    share: Scalar = 1.0

    @classmethod
    def of(cls, rule: SGD, backend: Backend, hparams: Tree, t: Any, like: Array) -> Rates:
        """Those of a rule at step t."""
        share: Any = 1.0
        if not is_off(rule.dampening):
            share = rule.damped(backend, backend.asarray(1.0, like=like), hparams, t)
        decay = resolve(backend, "weight_decay", rule.weight_decay, hparams, t)
        momentum = resolve(backend, "momentum", rule.momentum, hparams, t)
        return cls(resolve(backend, "lr", rule.lr, hparams, t), momentum, decay, share)


class Steps(NamedTuple):
    """The steps in these integers; ``kinds`` are the floats in which each leaf is counted.

    Lists that are given are written to, and gradients let go of, leaf by leaf: no more than one leaf is ever
    held twice. The parameters alone are not written to where they lie: the loss may have kept them.
    """

    backend: Backend
    form: FixedPoint
    kinds: Sequence[str]

    def begin(self, params: Sequence[Array], velocity: Sequence[Array]) -> tuple[Integers, Any]:
        """The integers of a state, and the first leaf that does not fit."""
        backend, form = self.backend, self.form
        none = backend.cast(backend.asarray(0), form.dtype) if backend.compiles else 0
        pairs = zip(params, velocity, strict=True)
        fault = self.first([form.misfits(x) + form.misfits(b) for x, b in pairs])
        integers, pool = [form.fixed(b) for b in velocity], [form.empty(b) for b in velocity]
        return self.split(Integers([form.fixed(x) for x in params], [], integers, pool, none)), fault

    def split(self, at: Integers) -> Integers:
        """With θ in two parts."""
        for k, kind in enumerate(self.kinds):
            at.params[k], rest = self.form.split(at.params[k], kind)
            at.rest.append(rest)
        return at

    def joined(self, at: Integers) -> Integers:
        """With θ in one, in lists of its own."""
        params = [self.form.joined(x, rest) for x, rest in zip(at.params, at.rest, strict=True)]
        return at._replace(params=params, rest=[])

    def is_at(self, at: Integers, params: Sequence[Array], velocity: Sequence[Array]) -> Any:
        """Are these the integers of a state, bit for bit?"""
        given = [at.params, at.rest, at.velocity, params, velocity]
        differ = self._over(_Leaf.differ, Rates(0.0, 0.0), None, [], given)
        return sum(count for (count,) in differ) == 0

    def digest(self, at: Integers) -> list[tuple[Any, ...]]:
        """Two sums of scrambled integers for each array, which are others where a single bit is another.

        That holds but for one case in 2^60, and nobody has to keep what is compared.
        """
        given = [at.params, at.rest, at.velocity]
        return self._over(_Leaf.scrambled, Rates(0.0, 0.0), None, [], given)

    def agree(self, x: list[tuple[Any, ...]], y: list[tuple[Any, ...]]) -> Any:
        """Are two digests the same?"""
        found: Any = True
        for one, other in zip(x, y, strict=True):
            for a, b in zip(one, other, strict=True):
                found = (a == b) & found
        return found

    def advance(self, at: Integers, g: Leaves, rates: Rates, ratio: Ratio) -> tuple[Integers, Any]:
        """One step, and the first leaf in which it does not fit."""
        at = self._unshared(at)
        used = [at.params, at.rest, at.velocity, at.pool]
        misfits = self._over(_Leaf.advance, rates, ratio, used, [g], last=g)
        return at._replace(top=pooled(at.top, ratio)), self.first([count for (count,) in misfits])

    def before(
        self, at: Integers, v: Leaves, c: Leaves, after: Scalar, rates: Rates, wanted: bool
    ) -> tuple[Integers, Scalar]:
        r"""The parameters before the step, θ ← θ + η b, and what comes back to b_{t+1}:

            c ← μ' c − η v,    ∂η = −⟨v, b_{t+1}⟩

        μ' is the momentum of the step after, ``after``. The slope in η is found if it is wanted.
        """
        at = self._unshared(at)
        method = partial(_Leaf.before, after=after, wanted=wanted)
        sums = self._over(method, rates, None, [at.params, at.rest, c], [at.velocity, v])
        return at, sum(slope for (slope,) in sums)

    def withdraw(
        self, at: Integers, c: Leaves, g: Leaves, rates: Rates, ratio: Ratio, wanted: bool
    ) -> tuple[Scalar, Scalar, Scalar]:
        r"""The velocity before the step, b ← (b − s (g + w θ)) / μ, and the other slopes, if they are wanted:

        ∂μ = ⟨c, b_t⟩,    ∂w = s ⟨c, θ⟩,    ∂s = ⟨c, g + w θ⟩
        """
        method = partial(_Leaf.withdraw, wanted=wanted)
        sums = self._over(method, rates, ratio, [at.velocity, at.pool], [c, g, at.params], last=g)
        momentum, decay, share = map(sum, zip(*sums, strict=True))
        return momentum, decay, share

    def pull(self, v: Leaves, c: Leaves, more: Leaves, rates: Rates) -> None:
        """Let v ← v + s w c + (∂g/∂θ)ᵀ s c, of which the last is given."""
        self._over(_Leaf.pull, rates, None, [v], [c, more], last=more)

    def scaled(self, a: Scalar, c: Leaves) -> Leaves:
        """A c."""
        return [self._leaf(kind, Rates(a, a), None).scaled(x) for kind, x in zip(self.kinds, c, strict=True)]

    def shared(self, c: Leaves, rates: Rates) -> Leaves:
        """Return s c, what comes back to the gradient."""
        return c if _is(rates.share, 1.0) else self.scaled(rates.share, c)

    def first(self, misfits: Sequence[Any]) -> Any:
        """The first leaf in which something does not fit; −1 says that all is well."""
        found: Any = -1
        for k, count in reversed(list(enumerate(misfits))):
            found = self.backend.xp.where(count == 0, found, k)
        return found

    def _unshared(self, at: Integers) -> Integers:
        """With parameters that nobody else holds."""
        for k, x in enumerate(at.params):
            at.params[k] = self.backend.copy(x)
        return at

    def _leaf(self, kind: str, rates: Rates, ratio: Any) -> _Leaf:
        leaf = _Leaf(self.backend, self.form, kind, rates, ratio)
        return leaf._replace(rates=Rates(*map(leaf._number, rates)))

    def _over(
        self,
        method: Callable[..., Any],
        rates: Rates,
        ratio: Any,
        used: Sequence[Leaves],
        given: Sequence[Sequence[Array]],
        last: Leaves | None = None,
    ) -> list[tuple[Any, ...]]:
        """Do it to each leaf, let go of those in ``last``, and return the sums of each."""
        rows = []
        for k, kind in enumerate(self.kinds):
            f = partial(method, self._leaf(kind, rates, ratio))
            new, sums = self.backend.memory.in_blocks(f, [x[k] for x in used], [x[k] for x in given])
            for leaves, leaf in zip(used, new, strict=True):
                leaves[k] = leaf
            if last is not None:
                last[k] = None
            rows.append(sums)
        return rows


class _Leaf(NamedTuple):
    """What happens to a leaf, element by element: new values, and sums."""

    backend: Backend
    form: FixedPoint
    kind: str
    rates: Rates
    ratio: Any

    def differ(self, near: Array, rest: Array, b: Array, x: Array, y: Array) -> Any:
        xp, form = self.backend.xp, self.form
        moved = (form.joined(near, rest) != form.fixed(x)) | (b != form.fixed(y))
        return (), (xp.sum(xp.where(moved, 1, 0)),)

    def scrambled(self, near: Array, rest: Array, b: Array) -> Any:
        integers = self.form.joined(near, rest), b
        return (), tuple(self.backend.xp.sum(_scrambled(x, k)) for x in integers for k in MULTIPLIERS)

    def advance(self, near: Array, rest: Array, b: Array, pool: Array, g: Array) -> Any:
        form, kind = self.form, self.kind
        b, pool = form.shrink(b, pool, self.ratio)
        kept, fresh = form.number(b, kind), self._fresh(g, near)
        b = b + form.fixed(fresh)
        change = self._change(b)
        misfits = form.misfits(kept, fresh) + form.misfits(near, change)
        return (*form.split(form.joined(near, rest) - form.fixed(change), kind), b, pool), (misfits,)

    def before(
        self, near: Array, rest: Array, c: Array, b: Array, v: Array, after: Scalar, wanted: bool
    ) -> Any:
        form, wide = self.form, self._wide(v)
        slope = -self.backend.inner(wide, form.number(b, self.kind)) if wanted else 0.0
        near, rest = form.split(form.joined(near, rest) + form.fixed(self._change(b)), self.kind)
        return (near, rest, self._like(c, self._number(after) * self._wide(c) - self.rates.lr * wide)), (
            slope,
        )

    def withdraw(self, b: Array, pool: Array, c: Array, g: Array, near: Array, wanted: bool) -> Any:
        form, inner, wide = self.form, self.backend.inner, self._wide(c)
        b, pool = form.grow(b - form.fixed(self._fresh(g, near)), pool, self.ratio)
        if not wanted:
            return (b, pool), (0.0, 0.0, 0.0)
        momentum, decay = inner(wide, form.number(b, self.kind)), self.rates.share * inner(wide, near)
        return (b, pool), (momentum, decay, inner(wide, self._decayed(g, near)))

    def pull(self, v: Array, c: Array, more: Array) -> Any:
        found = self._wide(v) + self._wide(more)
        if not _is(self.rates.decay, 0.0):
            found = found + self.rates.share * self.rates.decay * self._wide(c)
        return (self._like(v, found),), ()

    def scaled(self, c: Array) -> Array:
        return self._like(c, self.rates.lr * self._wide(c))

    def _change(self, b: Array) -> Array:
        """η b."""
        return self.rates.lr * self.form.number(b, self.kind)

    def _fresh(self, g: Array, near: Array) -> Array:
        """S (g + w θ)."""
        decayed = self._decayed(g, near)
        return decayed if _is(self.rates.share, 1.0) else self.rates.share * decayed

    def _decayed(self, g: Array, near: Array) -> Array:
        """G + w θ."""
        return self._wide(g) if _is(self.rates.decay, 0.0) else self._wide(g) + self.rates.decay * near

    def _number(self, rate: Scalar) -> Scalar:
        return rate if type(rate) in (int, float) else self._wide(rate)

    def _wide(self, x: Array) -> Array:
        return self.backend.cast(x, self.kind)

    def _like(self, x: Array, value: Array) -> Array:
        return self.backend.cast(value, self.backend.describe(x).dtype)


def _scrambled(x: Array, k: int) -> Array:
    """A permutation of the integers, in arithmetic that wraps around, that leaves no pattern."""
    for multiplier, shift in ((k, 15), (739982445, 12), (695872825, 15)):
        x = x * multiplier
        x = x ^ (x >> shift)
    return x


def _is(rate: Scalar, value: float) -> bool:
    """Is it this number for good?"""
    return isinstance(rate, float | int) and rate == value
