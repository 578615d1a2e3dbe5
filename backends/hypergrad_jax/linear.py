"""Derivatives of functions of trees, by ``jax.vjp`` and ``jax.linearize``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from hypergrad.backend import Pullback, Push, Tree
from hypergrad_jax.leaves import is_float, zeros
from hypergrad_jax.unsupported import translated
from hypergrad_jax.uses import outputs_of


@final
class Transposed(Pullback):
    """u ↦ uᵀ ∂f/∂primals, the function that ``jax.vjp`` returns."""

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
            gradients = iter(self._pull([jnp.asarray(g, x.dtype) for g, x in given if is_float(x)]))
        return self._unflatten([next(gradients) if is_float(x) else zeros(x) for x in self._inputs])

    @cached_property
    def reached(self) -> tuple[Tree, ...]:
        """By the results of the transposed program that depend on its argument; the others are zeros."""
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
class Tangent(Push):
    """ẋ ↦ ∂f ẋ, the function that ``jax.linearize`` returns."""

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
            tangents_out = iter(self._push(*(jnp.asarray(t, x.dtype) for t, x in given if is_float(x))))
        return self._rebuild([next(tangents_out) if is_float(x) else zeros(x) for x in self._outputs])

    @cached_property
    def reached(self) -> tuple[Tree, ...]:
        """By the arguments that the linear program depends on."""
        program = jax.make_jaxpr(self._push)(*(zeros(x) for x in self._inputs if is_float(x))).jaxpr
        used = iter(partial_eval.dce_jaxpr(program, [True] * len(program.outvars))[1])
        return self._unflatten([is_float(x) and next(used) for x in self._inputs])


class _Flat:
    """f as a function of its floating-point leaves: ``floats of the value, (all of the value, aux)``."""

    def __init__(self, f: Callable[..., tuple[Tree, Tree]], primals: tuple[Tree, ...]) -> None:
        self.leaves, structure = jax.tree_util.tree_flatten(primals)
        self.f = f
        self.variables = [x for x in self.leaves if is_float(x)]
        self.unflatten = partial(jax.tree_util.tree_unflatten, structure)

    def __call__(self, *variables: jax.Array) -> tuple[list[Any], tuple[list[Any], Tree]]:
        value, aux = self.f(*self.unflatten(_filled(self.leaves, variables)))
        outputs, form = jax.tree_util.tree_flatten(value)
        self.rebuild = partial(jax.tree_util.tree_unflatten, form)
        return [x for x in outputs if is_float(x)], (outputs, aux)


def vjp(f: Callable[..., tuple[Tree, Tree]], primals: tuple[Tree, ...]) -> tuple[Tree, Transposed, Tree]:
    """Evaluate f, which returns ``(value, aux)``, and keep its residuals: ``value, pullback, aux``."""
    flat = _Flat(f, primals)
    with translated():
        values, pull, (outputs, aux) = jax.vjp(flat, *flat.variables, has_aux=True)
    outputs = _filled(outputs, values)
    return flat.rebuild(outputs), Transposed(pull, flat.leaves, outputs, flat.unflatten), aux


def uses(f: Callable[..., tuple[Tree, Tree]], primals: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """For each primal a tree of booleans: is the value of f computed from the leaf?"""
    flat = _Flat(f, primals)
    program = jax.make_jaxpr(lambda *variables: flat(*variables)[0])(*flat.variables).jaxpr
    count = len(flat.variables)
    used = iter([any(outputs_of(program, [i == k for i in range(count)])) for k in range(count)])
    flags: tuple[Tree, ...] = flat.unflatten([is_float(x) and next(used) for x in flat.leaves])
    return flags


def linearize(f: Callable[..., tuple[Tree, Tree]], primals: tuple[Tree, ...]) -> tuple[Tree, Tangent, Tree]:
    """Like `vjp`, for tangents instead of cotangents: ``value, push, aux``."""
    flat = _Flat(f, primals)
    with translated():
        values, push, (outputs, aux) = jax.linearize(flat, *flat.variables, has_aux=True)
    outputs = _filled(outputs, values)
    return flat.rebuild(outputs), Tangent(push, flat.leaves, outputs, flat.unflatten, flat.rebuild), aux


def _filled(leaves: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The leaves, with those that are floats replaced by the values."""
    given = iter(values)
    return [next(given) if is_float(x) else x for x in leaves]
