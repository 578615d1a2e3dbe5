"""Steps of momentum SGD in integers, forwards and backwards, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from hypergrad.backend import Array, Backend, Scalar, Tree
from hypergrad.tapes.reversible.fixedpoint import FixedPoint, Ratio, pooled
from hypergrad.updates.formula import is_off, scalar_of
from hypergrad.updates.sgd import SGD, damped

Leaves = list[Array]

MULTIPLIERS = 1597334677, 1103515245
"""Odd multipliers, one for each of two hashes of integers."""


class Integers(NamedTuple):
    """θ, b and the pool as integers, leaf by leaf, and ``top``, the largest value that the pool may have.

    During a run θ is in two parts: the floats at which the loss is evaluated, and ``rest``, the small
    integers by which θ differs from them. So θ is not stored twice, as integers and as floats.
    """

    params: Leaves
    rest: Leaves
    velocity: Leaves
    pool: Leaves
    top: Any


class Rates(NamedTuple):
    """The rates of a step: b ← μ b + s (g + w θ), θ ← θ − η b, with s = 1 − δ."""

    lr: Scalar
    momentum: Scalar
    decay: Scalar = 0.0
    share: Scalar = 1.0

    @classmethod
    def of(cls, rule: SGD, backend: Backend, hparams: Tree, t: Any, like: Array) -> Rates:
        """Return the rates of a rule at step t."""
        lr, momentum, decay, dampening = (
            scalar_of(backend, name, getattr(rule, name), hparams, t) for name in rule.hypers
        )
        share: Any = 1.0
        if not is_off(rule.dampening):
            share = damped(backend, dampening, backend.asarray(1.0, like=like), t)
        return cls(lr, momentum, decay, share)


class Steps(NamedTuple):
    """Steps on `Integers`; ``kinds`` are the float dtypes in which the leaves are computed.

    The methods overwrite the lists passed to them and release gradients leaf by leaf, so that at most one
    leaf is held twice. Only parameters are copied before they are overwritten: the loss may have kept them.
    """

    backend: Backend
    form: FixedPoint
    kinds: Sequence[str]

    def begin(self, params: Sequence[Array], velocity: Sequence[Array]) -> tuple[Integers, Any]:
        """Return the integers of a state, and the first leaf that does not fit."""
        backend, form = self.backend, self.form
        zero = backend.cast(backend.asarray(0), form.dtype) if backend.compiles else 0
        pairs = zip(params, velocity, strict=True)
        fault = self.first([form.misfits(x) + form.misfits(b) for x, b in pairs])
        integers, pool = [form.fixed(b) for b in velocity], [form.empty(b) for b in velocity]
        return self.split(Integers([form.fixed(x) for x in params], [], integers, pool, zero)), fault

    def split(self, at: Integers) -> Integers:
        """Split θ into its two parts, in the lists of ``at``."""
        for k, kind in enumerate(self.kinds):
            at.params[k], rest = self.form.split(at.params[k], kind)
            at.rest.append(rest)
        return at

    def joined(self, at: Integers) -> Integers:
        """Join the two parts of θ, in new lists."""
        params = [self.form.joined(x, rest) for x, rest in zip(at.params, at.rest, strict=True)]
        return at._replace(params=params, rest=[])

    def is_at(self, at: Integers, params: Sequence[Array], velocity: Sequence[Array]) -> Any:
        """Return whether these are the integers of a state, bit for bit."""
        given = [at.params, at.rest, at.velocity, params, velocity]
        differ = self._each_leaf(_Leaf.differ, Rates(0.0, 0.0), None, [], given)
        return sum(count for (count,) in differ) == 0

    def digest(self, at: Integers) -> list[tuple[Any, ...]]:
        """Return two sums of hashed integers for each array, which change if a single bit changes.

        A change goes unnoticed in one case in 2^60. Comparing digests spares a copy of the state.
        """
        given = [at.params, at.rest, at.velocity]
        return self._each_leaf(_Leaf.hashes, Rates(0.0, 0.0), None, [], given)

    def agree(self, x: list[tuple[Any, ...]], y: list[tuple[Any, ...]]) -> Any:
        """Return whether two digests are equal."""
        equal: Any = True
        for one, other in zip(x, y, strict=True):
            for a, b in zip(one, other, strict=True):
                equal = (a == b) & equal
        return equal

    def advance(self, at: Integers, g: Leaves, rates: Rates, ratio: Ratio) -> tuple[Integers, Any]:
        """Take one step, and return the first leaf in which it does not fit."""
        at = self._unshared(at)
        overwritten = [at.params, at.rest, at.velocity, at.pool]
        misfits = self._each_leaf(_Leaf.advance, rates, ratio, overwritten, [g], released=g)
        return at._replace(top=pooled(at.top, ratio)), self.first([count for (count,) in misfits])

    def undo_params(
        self, at: Integers, v: Leaves, c: Leaves, next_momentum: Scalar, rates: Rates, slopes: bool
    ) -> tuple[Integers, Scalar]:
        r"""Undo the update of the parameters, θ ← θ + η b, and update c, the cotangent of b_{t+1}:

            c ← μ' c − η v,    ∂η = −⟨v, b_{t+1}⟩

        μ' is the momentum of the next step, ``next_momentum``. With ``slopes`` ∂η is returned, otherwise 0.
        """
        at = self._unshared(at)
        method = partial(_Leaf.undo_params, next_momentum=next_momentum, slopes=slopes)
        sums = self._each_leaf(method, rates, None, [at.params, at.rest, c], [at.velocity, v])
        return at, sum(slope for (slope,) in sums)

    def undo_velocity(
        self, at: Integers, c: Leaves, g: Leaves, rates: Rates, ratio: Ratio, slopes: bool
    ) -> tuple[Scalar, Scalar, Scalar]:
        r"""Undo the update of the velocity, b ← (b − s (g + w θ)) / μ, and return the other slopes:

            ∂μ = ⟨c, b_t⟩,    ∂w = s ⟨c, θ⟩,    ∂s = ⟨c, g + w θ⟩

        Without ``slopes`` they are returned as 0.
        """
        method = partial(_Leaf.undo_velocity, slopes=slopes)
        sums = self._each_leaf(method, rates, ratio, [at.velocity, at.pool], [c, g, at.params], released=g)
        momentum, decay, share = map(sum, zip(*sums, strict=True))
        return momentum, decay, share

    def pull(self, v: Leaves, c: Leaves, through_g: Leaves, rates: Rates) -> None:
        """Update v ← v + s w c + (∂g/∂θ)ᵀ s c, where the last term is given as ``through_g``."""
        self._each_leaf(_Leaf.pull, rates, None, [v], [c, through_g], released=through_g)

    def scaled(self, a: Scalar, c: Leaves) -> Leaves:
        """Return a c."""
        return [self._leaf(kind, Rates(a, a), None).scaled(x) for kind, x in zip(self.kinds, c, strict=True)]

    def shared(self, c: Leaves, rates: Rates) -> Leaves:
        """Return s c, the cotangent of the gradient."""
        return c if _is_constant(rates.share, 1.0) else self.scaled(rates.share, c)

    def first(self, misfits: Sequence[Any]) -> Any:
        """Return the first leaf in which something does not fit; −1 if all fits."""
        first: Any = -1
        for k, count in reversed(list(enumerate(misfits))):
            first = self.backend.xp.where(count == 0, first, k)
        return first

    def _unshared(self, at: Integers) -> Integers:
        """Copy the parameters, in case something else refers to them."""
        for k, x in enumerate(at.params):
            at.params[k] = self.backend.copy(x)
        return at

    def _leaf(self, kind: str, rates: Rates, ratio: Any) -> _Leaf:
        leaf = _Leaf(self.backend, self.form, kind, rates, ratio)
        return leaf._replace(rates=Rates(*map(leaf._number, rates)))

    def _each_leaf(
        self,
        method: Callable[..., Any],
        rates: Rates,
        ratio: Any,
        overwritten: Sequence[Leaves],
        inputs: Sequence[Sequence[Array]],
        released: Leaves | None = None,
    ) -> list[tuple[Any, ...]]:
        """Apply a method to each leaf, empty the list ``released``, and return the sums of each leaf."""
        rows = []
        for k, kind in enumerate(self.kinds):
            f = partial(method, self._leaf(kind, rates, ratio))
            new, sums = self.backend.memory.in_blocks(f, [x[k] for x in overwritten], [x[k] for x in inputs])
            for leaves, leaf in zip(overwritten, new, strict=True):
                leaves[k] = leaf
            if released is not None:
                released[k] = None
            rows.append(sums)
        return rows


class _Leaf(NamedTuple):
    """The operations on a leaf, element by element; each returns new values, and sums."""

    backend: Backend
    form: FixedPoint
    kind: str
    rates: Rates
    ratio: Any

    def differ(self, near: Array, rest: Array, b: Array, x: Array, y: Array) -> Any:
        xp, form = self.backend.xp, self.form
        differs = (form.joined(near, rest) != form.fixed(x)) | (b != form.fixed(y))
        return (), (xp.sum(xp.where(differs, 1, 0)),)

    def hashes(self, near: Array, rest: Array, b: Array) -> Any:
        integers = self.form.joined(near, rest), b
        return (), tuple(self.backend.xp.sum(_hashed(x, k)) for x in integers for k in MULTIPLIERS)

    def advance(self, near: Array, rest: Array, b: Array, pool: Array, g: Array) -> Any:
        form, kind = self.form, self.kind
        b, pool = form.shrink(b, pool, self.ratio)
        old, fresh = form.number(b, kind), self._fresh(g, near)
        b = b + form.fixed(fresh)
        change = self._change(b)
        misfits = form.misfits(old, fresh) + form.misfits(near, change)
        return (*form.split(form.joined(near, rest) - form.fixed(change), kind), b, pool), (misfits,)

    def undo_params(
        self, near: Array, rest: Array, c: Array, b: Array, v: Array, next_momentum: Scalar, slopes: bool
    ) -> Any:
        form, wide = self.form, self._wide(v)
        slope = -self.backend.inner(wide, form.number(b, self.kind)) if slopes else 0.0
        near, rest = form.split(form.joined(near, rest) + form.fixed(self._change(b)), self.kind)
        c = self._like(c, self._number(next_momentum) * self._wide(c) - self.rates.lr * wide)
        return (near, rest, c), (slope,)

    def undo_velocity(self, b: Array, pool: Array, c: Array, g: Array, near: Array, slopes: bool) -> Any:
        form, inner, wide = self.form, self.backend.inner, self._wide(c)
        b, pool = form.grow(b - form.fixed(self._fresh(g, near)), pool, self.ratio)
        if not slopes:
            return (b, pool), (0.0, 0.0, 0.0)
        momentum, decay = inner(wide, form.number(b, self.kind)), self.rates.share * inner(wide, near)
        return (b, pool), (momentum, decay, inner(wide, self._decayed(g, near)))

    def pull(self, v: Array, c: Array, through_g: Array) -> Any:
        total = self._wide(v) + self._wide(through_g)
        if not _is_constant(self.rates.decay, 0.0):
            total = total + self.rates.share * self.rates.decay * self._wide(c)
        return (self._like(v, total),), ()

    def scaled(self, c: Array) -> Array:
        return self._like(c, self.rates.lr * self._wide(c))

    def _change(self, b: Array) -> Array:
        """Return η b."""
        return self.rates.lr * self.form.number(b, self.kind)

    def _fresh(self, g: Array, near: Array) -> Array:
        """Return s (g + w θ)."""
        decayed = self._decayed(g, near)
        return decayed if _is_constant(self.rates.share, 1.0) else self.rates.share * decayed

    def _decayed(self, g: Array, near: Array) -> Array:
        """Return g + w θ."""
        return (
            self._wide(g) if _is_constant(self.rates.decay, 0.0) else self._wide(g) + self.rates.decay * near
        )

    def _number(self, rate: Scalar) -> Scalar:
        return rate if type(rate) in (int, float) else self._wide(rate)

    def _wide(self, x: Array) -> Array:
        return self.backend.cast(x, self.kind)

    def _like(self, x: Array, value: Array) -> Array:
        return self.backend.cast(value, self.backend.describe(x).dtype)


def _hashed(x: Array, k: int) -> Array:
    """Hash integers by a permutation, in arithmetic that wraps around."""
    for multiplier, shift in ((k, 15), (739982445, 12), (695872825, 15)):
        x = x * multiplier
        x = x ^ (x >> shift)
    return x


def _is_constant(rate: Scalar, value: float) -> bool:
    """Return whether a rate is this number, and not traced or learned."""
    return isinstance(rate, float | int) and rate == value
