"""Derivatives in the words of a textbook, for laws and tests: no estimator needs them."""

from __future__ import annotations

from collections.abc import Callable

from hypergrad.backend import Backend, Scalar, Tree


def value_and_grad(backend: Backend, f: Callable[[Tree], Scalar], x: Tree) -> tuple[Scalar, Tree]:
    """Value and gradient of a scalar function of one tree."""
    value, pullback = backend.pullback(f, x)
    (gradient,) = pullback(backend.xp.ones_like(value))
    return value, gradient


def jvp(
    backend: Backend, f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """Return ``(f(*primals), ∂f · tangents)``."""
    value, push, _ = backend.linearize(lambda *xs: (f(*xs), None), *primals)
    return value, push(*tangents)
