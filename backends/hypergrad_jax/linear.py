"""Linearisations of functions of trees, by ``jax.vjp`` and ``jax.jvp``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from hypergrad.backend import Tree
from hypergrad_jax.leaves import is_float, zeros
from hypergrad_jax.unsupported import translated


@final
class Pullback:
    """u ↦ uᵀ ∂f/∂primals at one linearisation; see `hypergrad.backend.Pullback`."""

    def __init__(
        self,
        pull: Callable[..., Any],
        inputs: list[Any],
        outputs: list[Any],
        unflatten: Callable[[Sequence[Any]], tuple[Tree, ...]],
    ) -> None:
        self._pull, self._inputs, self._outputs, self._unflatten = pull, inputs, outputs, unflatten

    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        given = zip(jax.tree_util.tree_leaves(cotangent), self._outputs, strict=True)
        with translated():
            found = iter(self._pull([jnp.asarray(g, x.dtype) for g, x in given if is_float(x)]))
        return self._unflatten([next(found) if is_float(x) else zeros(x) for x in self._inputs])

    last = __call__

    def onto(self, k: int) -> Callable[[Tree], Tree]:
        """What is not asked for is not computed, once it is compiled."""
        return lambda cotangent: self(cotangent)[k]

    @cached_property
    def reached(self) -> tuple[Tree, ...]:
        """Which parts of the transposed program depend on its argument: the others are zeros."""
        weights = [jnp.zeros_like(x) for x in self._outputs if is_float(x)]
        with translated():
            program = jax.make_jaxpr(self._pull)(weights).jaxpr
        count = len(program.outvars)
        used = iter(
            [any(partial_eval.dce_jaxpr(program, [i == k for i in range(count)])[1]) for k in range(count)]
        )
        return self._unflatten([is_float(x) and next(used) for x in self._inputs])

    @property
    def nbytes(self) -> int:
        kept = [x for x in jax.tree_util.tree_leaves(self._pull) if isinstance(x, jax.Array)]
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in kept)


@final
class Push:
    """ẋ ↦ ∂f ẋ at one linearisation; see `hypergrad.backend.Backend.linearize`."""

    def __init__(
        self,
        push: Callable[..., Any],
        inputs: list[Any],
        outputs: list[Any],
        unflatten: Callable[[Sequence[Any]], tuple[Tree, ...]],
        rebuild: Callable[[Sequence[Any]], Tree],
    ) -> None:
        self._push, self._inputs, self._outputs = push, inputs, outputs
        self._unflatten, self._rebuild = unflatten, rebuild

    def __call__(self, *tangents: Tree) -> Tree:
        given = zip(jax.tree_util.tree_leaves(tangents), self._inputs, strict=True)
        with translated():
            found = iter(self._push(*(jnp.asarray(t, x.dtype) for t, x in given if is_float(x))))
        return self._rebuild([next(found) if is_float(x) else zeros(x) for x in self._outputs])

    @cached_property
    def reached(self) -> tuple[Tree, ...]:
        """On which of its arguments does the linear program depend?"""
        program = jax.make_jaxpr(self._push)(*(zeros(x) for x in self._inputs if is_float(x))).jaxpr
        used = iter(partial_eval.dce_jaxpr(program, [True] * len(program.outvars))[1])
        return self._unflatten([is_float(x) and next(used) for x in self._inputs])


class _Flat:
    """f as a function of its floating-point leaves alone, which returns its own, and all else beside them."""

    def __init__(self, f: Callable[..., Any], primals: tuple[Tree, ...], has_aux: bool) -> None:
        self.leaves, structure = jax.tree_util.tree_flatten(primals)
        self.f, self.has_aux = f, has_aux
        self.variables = [x for x in self.leaves if is_float(x)]
        self.fill = partial(_filled, structure, self.leaves)
        self.unflatten = partial(jax.tree_util.tree_unflatten, structure)

    def __call__(self, *variables: jax.Array) -> tuple[list[Any], tuple[list[Any], Tree]]:
        result = self.f(*self.fill(variables))
        value, aux = result if self.has_aux else (result, None)
        outputs, form = jax.tree_util.tree_flatten(value)
        self.rebuild = partial(jax.tree_util.tree_unflatten, form)
        return [x for x in outputs if is_float(x)], (outputs, aux)

    def outputs(self, values: Sequence[Any], outputs: list[Any]) -> list[Any]:
        """All leaves of the value, in which those that were differentiated take their places."""
        given = iter(values)
        return [next(given) if is_float(x) else x for x in outputs]


def linearise(f: Callable[..., Any], primals: tuple[Tree, ...], has_aux: bool) -> tuple[Tree, Tree, Pullback]:
    """Evaluate f and keep its residuals: ``value, aux, pullback``."""
    flat = _Flat(f, primals, has_aux)
    with translated():
        values, pull, (outputs, aux) = jax.vjp(flat, *flat.variables, has_aux=True)
    outputs = flat.outputs(values, outputs)
    return flat.rebuild(outputs), aux, Pullback(pull, flat.leaves, outputs, flat.unflatten)


def linearised(f: Callable[..., Any], primals: tuple[Tree, ...], has_aux: bool) -> tuple[Tree, Tree, Push]:
    """The same, to be pushed forward: ``value, aux, push``."""
    flat = _Flat(f, primals, has_aux)
    with translated():
        values, push, (outputs, aux) = jax.linearize(flat, *flat.variables, has_aux=True)
    outputs = flat.outputs(values, outputs)
    return flat.rebuild(outputs), aux, Push(push, flat.leaves, outputs, flat.unflatten, flat.rebuild)


def pushforward(
    f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """Evaluate f and its derivative in a direction: ``value, tangent``."""
    leaves, structure = jax.tree_util.tree_flatten(primals)
    directions = jax.tree_util.tree_leaves(tangents)
    pairs = [(x, t) for x, t in zip(leaves, directions, strict=True) if is_float(x)]

    def g(*variables: jax.Array) -> Tree:
        return f(*_filled(structure, leaves, variables))

    value, tangent = jax.jvp(g, tuple(x for x, _ in pairs), tuple(t for _, t in pairs))
    return value, jax.tree_util.tree_map(lambda x, t: t if is_float(x) else zeros(x), value, tangent)


def _filled(structure: Any, leaves: list[Any], variables: Sequence[jax.Array]) -> tuple[Tree, ...]:
    given = iter(variables)
    filled = [next(given) if is_float(x) else x for x in leaves]
    trees: tuple[Tree, ...] = jax.tree_util.tree_unflatten(structure, filled)
    return trees
