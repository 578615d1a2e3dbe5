"""Which inputs a program computes its outputs from, whether there is a slope or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal


def outputs_of(program: Jaxpr, given: Sequence[bool]) -> list[bool]:
    """Return which outputs of a program depend on the inputs that are marked.

    Nothing depends on what ``stop_gradient`` has detached. Of a loop or a branch every output counts if an
    input does.
    """
    marked = {var for var, mark in zip(program.invars, given, strict=True) if mark}

    def is_marked(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in marked

    for equation in program.eqns:
        marks = [is_marked(atom) for atom in equation.invars]
        if not any(marks) or equation.primitive.name == "stop_gradient":
            continue
        called = _called(equation)
        out = [True] * len(equation.outvars) if called is None else outputs_of(called, marks)
        marked.update(var for var, mark in zip(equation.outvars, out, strict=True) if mark)
    return [is_marked(atom) for atom in program.outvars]


def _called(equation: Any) -> Jaxpr | None:
    """Return the program that an equation calls once, with its own inputs and outputs, if it does so."""
    for name in ("jaxpr", "call_jaxpr"):
        closed = equation.params.get(name)
        program: Jaxpr | None = getattr(closed, "jaxpr", closed)
        if equation.primitive.name in ("scan", "while", "cond") or program is None:
            continue
        if len(program.invars) == len(equation.invars) and len(program.outvars) == len(equation.outvars):
            return program
    return None
