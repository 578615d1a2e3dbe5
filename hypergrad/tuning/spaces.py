r"""Domains of hyperparameters: free coordinates u, and the map u ↦ λ into the domain.

The hypergradient is chained through the map exactly, dC2/du = (∂λ/∂u)ᵀ dC2/dλ. One space serves a whole
tree of hyperparameters. A tree of spaces gives each leaf its own; one space may apply to a whole branch::

    space = hg.Positive()
    space = {"log_l2": hg.Real(), "noise": hg.NonNegative()}
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

from hypergrad.backend import Array, Backend, Tree
from hypergrad.backend.arguments import is_number
from hypergrad.errors import ArgumentError


class Space(ABC):
    """A set of hyperparameter values, and free coordinates for it."""

    @abstractmethod
    def constrain(self, xp: Any, u: Array) -> Array:
        """Return λ for free coordinates u."""

    @abstractmethod
    def unconstrain(self, xp: Any, h: Array) -> Array:
        """Return free coordinates u for λ; the inverse of `constrain`."""

    @abstractmethod
    def project(self, xp: Any, u: Array) -> Array:
        """Return the nearest allowed u, for a u that an update has produced."""

    @abstractmethod
    def contains(self, xp: Any, h: Array) -> Array:
        """Return for each entry of λ whether it lies inside, so that its free coordinates are finite."""


Spaces = Space | Mapping[Any, "Spaces"] | list[Any] | tuple[Any, ...]
"""One space, or a tree of them that stops at any level."""


@final
@dataclass(frozen=True)
class Real(Space):
    """All real numbers: λ = u. For logarithms, biases, anything without a bound."""

    def constrain(self, xp: Any, u: Array) -> Array:
        return u

    def unconstrain(self, xp: Any, h: Array) -> Array:
        return h

    def project(self, xp: Any, u: Array) -> Array:
        return u

    def contains(self, xp: Any, h: Array) -> Array:
        return xp.isfinite(h)


@final
@dataclass(frozen=True)
class Positive(Space):
    r"""λ > 0 by a smooth map, so that an update never reaches the boundary.

    λ = eᵘ              link="exp": equal ratios count the same; for strengths and rates
    λ = log(1 + eᵘ)     link="softplus": linear for large λ; for noise levels

    u is kept in the range where λ is a normal number of its dtype.

    Raises:
        ArgumentError: for any other link.
    """

    link: Literal["exp", "softplus"] = "exp"

    def __post_init__(self) -> None:
        if self.link not in ("exp", "softplus"):
            raise ArgumentError(f"Positive: link = {self.link!r}; it must be 'exp' or 'softplus'")

    def constrain(self, xp: Any, u: Array) -> Array:
        if self.link == "exp":
            return xp.exp(u)
        large = u > 0  # neither |u| nor a maximum: frameworks disagree on their derivatives at 0
        return xp.where(large, u, 0.0 * u) + xp.log1p(xp.exp(xp.where(large, -u, u)))

    def unconstrain(self, xp: Any, h: Array) -> Array:
        if self.link == "exp":
            return xp.log(h)
        return h + xp.log(-xp.expm1(-h))

    def project(self, xp: Any, u: Array) -> Array:
        # Outside of this range λ would be 0 or infinite in this dtype; a factor of e is left for rounding.
        info = xp.finfo(u.dtype)
        largest = float(info.max) / math.e
        return _between(xp, u, _log_tiny(info), math.log(largest) if self.link == "exp" else largest)

    def contains(self, xp: Any, h: Array) -> Array:
        return xp.isfinite(h) & (h > 0)


@final
@dataclass(frozen=True)
class NonNegative(Space):
    """λ ≥ 0 with u = λ, clipped at 0 after each update, as in the T1−T2 paper.

    λ can be exactly zero. There, a hypergradient that points out of the domain has no effect.
    """

    def constrain(self, xp: Any, u: Array) -> Array:
        return u

    def unconstrain(self, xp: Any, h: Array) -> Array:
        return h

    def project(self, xp: Any, u: Array) -> Array:
        return xp.maximum(u, xp.zeros_like(u))

    def contains(self, xp: Any, h: Array) -> Array:
        return xp.isfinite(h) & (h >= 0)


@final
@dataclass(frozen=True)
class Interval(Space):
    r"""low < λ < high by λ = low + (high − low) / (1 + e⁻ᵘ). For momenta, dropout rates, mixing weights.

    u is kept in the range where λ is inside in its dtype.

    Raises:
        ArgumentError: unless they are finite numbers, low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        numbers = is_number(self.low) and is_number(self.high)
        if not (numbers and -float("inf") < self.low < self.high < float("inf")):
            raise ArgumentError(
                f"Interval: [{self.low!r}, {self.high!r}] is not two finite numbers low < high"
            )

    def constrain(self, xp: Any, u: Array) -> Array:
        # By the distance from the nearer end, which does not cancel; neither power overflows.
        width, nearer_low, zero = self.high - self.low, u < 0, 0.0 * u
        up, down = xp.exp(xp.where(nearer_low, u, zero)), xp.exp(xp.where(nearer_low, zero, -u))
        return xp.where(
            nearer_low, self.low + width * up / (1.0 + up), self.high - width * down / (1.0 + down)
        )

    def unconstrain(self, xp: Any, h: Array) -> Array:
        return xp.log(h - self.low) - xp.log(self.high - h)

    def project(self, xp: Any, u: Array) -> Array:
        # Where λ would round to an end: 3/4 of the distance to the next number rounds to that number.
        info, width = xp.finfo(u.dtype), self.high - self.low
        low, high = (
            max(math.log(0.75 * gap / width) if gap else -math.inf, _log_tiny(info))
            for gap in (_gap(self.low, 1, float(info.eps)), _gap(self.high, -1, float(info.eps)))
        )
        return _between(xp, u, low, -high)

    def contains(self, xp: Any, h: Array) -> Array:
        return (h > self.low) & (h < self.high)


@final
@dataclass(frozen=True)
class Simplex(Space):
    r"""Positive numbers that sum to 1 along the last axis: λ = softmax(u). For weights of a mixture.

    u is determined up to a constant; `unconstrain` returns log λ. u is kept in the range where every λ is a
    normal number of its dtype.
    """

    def constrain(self, xp: Any, u: Array) -> Array:
        shifted = xp.exp(u - xp.max(u, axis=-1, keepdims=True))
        return shifted / xp.sum(shifted, axis=-1, keepdims=True)

    def unconstrain(self, xp: Any, h: Array) -> Array:
        return xp.log(h)

    def project(self, xp: Any, u: Array) -> Array:
        lowest = _log_tiny(xp.finfo(u.dtype)) + math.log(max(u.shape[-1], 1))
        return xp.maximum(u, xp.zeros_like(u) + (xp.max(u, axis=-1, keepdims=True) + lowest))

    def contains(self, xp: Any, h: Array) -> Array:
        total = xp.sum(h, axis=-1, keepdims=True)
        return (h > 0) & (xp.abs(total - 1.0) < 1e-3)


def _log_tiny(info: Any) -> float:
    return math.log(float(info.tiny)) + 1.0


def _between(xp: Any, u: Array, low: float, high: float) -> Array:
    return xp.minimum(xp.maximum(u, xp.zeros_like(u) + low), xp.zeros_like(u) + high)


def _gap(end: float, side: int, eps: float) -> float:
    """Return the distance from ``end`` to the next number above it (side 1) or below it (side −1)."""
    mantissa, exponent = math.frexp(abs(end))
    halved = mantissa == 0.5 and end * side < 0  # below a power of two numbers lie twice as close
    return math.ldexp(eps, exponent - 1 - halved) if end else 0.0


def spread(backend: Backend, space: Spaces, hparams: Tree) -> Tree:
    """Return one space for each leaf, from one space or from a tree of them, which may apply to branches.

    Raises:
        ArgumentError: if the tree of spaces does not fit the hyperparameters, or holds anything else.
    """
    for path, leaf in zip(backend.paths(space, "space"), backend.flatten(space)[0], strict=True):
        if not isinstance(leaf, Space):
            raise ArgumentError(f"{path} is {leaf!r}, not a space such as hg.Positive()")
    try:
        return backend.map(lambda s, part: backend.map(lambda _: s, part), space, hparams)
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(
            "space does not fit hparams: give one space, or a tree of spaces with the keys of hparams "
            "(hg.Real() leaves a part free). Leaves of hparams: "
            + ", ".join(backend.paths(hparams, "hparams"))
        ) from error


def constrain(backend: Backend, spaces: Tree, free: Tree) -> Tree:
    """Return λ for free coordinates, leaf by leaf."""
    return backend.map(lambda s, u: s.constrain(backend.xp, u), spaces, free)


def unconstrain(backend: Backend, spaces: Tree, hparams: Tree) -> Tree:
    """Return free coordinates for λ, leaf by leaf.

    Raises:
        ArgumentError: if a leaf can be read and is outside its space.
    """
    paths, (leaves, unflatten) = backend.paths(hparams, "hparams"), backend.flatten(hparams)
    parts = zip(paths, backend.flatten(spaces)[0], leaves, strict=True)
    return unflatten([_unconstrained(backend, path, space, h) for path, space, h in parts])


def free_coordinates(backend: Backend, spaces: Tree, free: Tree, hparams: Tree) -> Tree:
    """Return free coordinates for λ: the leaf of ``free`` if it still gives λ, and otherwise `unconstrain`.

    For loops that keep λ itself, which the caller may change between two updates. Coordinates are kept as
    long as possible, because λ does not always determine them: at the ends of an `Interval`, for instance.

    Raises:
        ArgumentError: as `unconstrain`.
    """
    xp = backend.xp
    paths, (leaves, unflatten) = backend.paths(hparams, "hparams"), backend.flatten(hparams)

    def coordinates(path: str, space: Space, u: Array, h: Array) -> Array:
        if isinstance(space, Real):
            return h
        unchanged = xp.all(space.constrain(xp, u) == h)
        if not backend.readable(unchanged):
            return xp.where(unchanged, u, space.unconstrain(xp, h))
        return u if bool(unchanged) else _unconstrained(backend, path, space, h)

    parts = zip(paths, backend.flatten(spaces)[0], backend.flatten(free)[0], leaves, strict=True)
    return unflatten([coordinates(*part) for part in parts])


def _unconstrained(backend: Backend, path: str, space: Space, h: Array) -> Array:
    inside = space.contains(backend.xp, h)
    if backend.readable(h) and not bool(backend.xp.all(inside)):
        raise ArgumentError(f"{path} lies outside its space {space}: start inside, not on the boundary")
    return space.unconstrain(backend.xp, h)


def chain(backend: Backend, spaces: Tree, free: Tree, hypergradient: Tree) -> Tree:
    """Return dC2/du = (∂λ/∂u)ᵀ dC2/dλ."""
    if all(isinstance(space, Real) for space in backend.flatten(spaces)[0]):
        return hypergradient
    _, pullback = backend.pullback(lambda u: constrain(backend, spaces, u), free)
    (gradient,) = pullback(hypergradient)
    return gradient


def project(backend: Backend, spaces: Tree, free: Tree) -> tuple[Tree, Any]:
    """Return the nearest allowed coordinates, and how many entries had to change."""
    xp = backend.xp
    allowed = backend.map(lambda s, u: s.project(xp, u), spaces, free)
    changed = backend.map(lambda new, old: xp.sum(xp.where(new != old, 1, 0)), allowed, free)
    return allowed, sum(backend.flatten(changed)[0])
