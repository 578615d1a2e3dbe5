"""Derivatives of functions of trees, on the tracer of HIPS autograd.

``autograd.make_vjp`` differentiates with respect to one argument and warns when it finds no path.
Hypergradients need more: several trees at one linearisation, a pullback that can be called many times, which
leaves the graph reaches, and how much memory it holds. The nodes, the rules for each operation and the order
of the backward pass are autograd's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from types import FunctionType
from typing import Any, final

import numpy as np
import optree
from autograd.core import VJPNode, add_outgrads, defvjp, vspace
from autograd.tracer import Node, isbox, new_box, primitive, trace_stack
from autograd.util import toposort

from hypergrad.backend import Pullback, Tree
from hypergrad.errors import UnsupportedOpError
from hypergrad_numpy.unsupported import name_operation

_lock = threading.Lock()


def _new_level() -> int:
    """Return a level above all traces so far, so that nested and concurrent traces are never confused."""
    with _lock:
        trace_stack.top += 1
        level: int = trace_stack.top
        return level


@final
class _Sink:
    """A node whose parents are all outputs of a graph."""

    def __init__(self, parents: list[VJPNode]) -> None:
        self.parents = parents


@final
class TapedPullback(Pullback):
    """u ↦ uᵀ ∂f/∂primals, along the nodes that autograd's tracer made."""

    def __init__(
        self,
        leaves: list[Any],
        roots: list[VJPNode | None],
        unflatten: Callable[..., Any],
        ends: list[VJPNode | None],
    ) -> None:
        self._leaves, self._roots, self._unflatten, self._ends = leaves, roots, unflatten, ends
        self._order: list[VJPNode] = list(toposort(_Sink([end for end in ends if end is not None])))[1:]

    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        gradients: dict[VJPNode, tuple[Any, bool]] = {}
        for end, g in zip(self._ends, optree.tree_leaves(cotangent), strict=True):
            if end is not None:
                gradients[end] = add_outgrads(gradients.get(end), g)
        for node in self._order:
            if node.parents:
                outgoing, _ = gradients.pop(node)
                try:
                    each = list(node.vjp(outgoing))
                except NotImplementedError as error:
                    name_operation(error)
                    raise
                for parent, g in zip(node.parents, each, strict=False):
                    gradients[parent] = add_outgrads(gradients.get(parent), g)
        results: list[Any] = []
        for leaf, root in zip(self._leaves, self._roots, strict=True):
            results.append(cast(gradients[root][0], leaf) if root in gradients else zeros_like(leaf))
        cotangents: tuple[Tree, ...] = self._unflatten(results)
        return cotangents

    @cached_property
    def reached(self) -> tuple[Tree, ...]:
        nodes = set(self._order)
        flags: tuple[Tree, ...] = self._unflatten([root in nodes for root in self._roots])
        return flags

    @property
    def nbytes(self) -> int:
        return _nbytes([node.vjp for node in self._order])


def _nbytes(rules: list[Any]) -> int:
    """Return the bytes of the arrays that are bound in the closures of the nodes' rules."""
    todo, visited, owners = rules, set[int](), dict[int, int]()
    while todo:
        x = todo.pop()
        if id(x) in visited:
            continue
        visited.add(id(x))
        if isinstance(x, np.ndarray):
            owner = x.base if isinstance(x.base, np.ndarray) else x
            owners[id(owner)] = owner.nbytes
        elif isinstance(x, FunctionType):
            todo.extend(map(attrgetter("cell_contents"), x.__closure__ or ()))
        elif isinstance(x, tuple | list):
            todo.extend(x)
        elif isbox(x):
            todo.append(x._value)
    return sum(owners.values())


def is_float(leaf: Any) -> bool:
    """Return whether a leaf is floating point, so that derivatives can be taken with respect to it."""
    return leaf.dtype.kind == "f" if hasattr(leaf, "dtype") else isinstance(leaf, float)


def trace(f: Callable[..., tuple[Tree, Tree]], primals: Tree) -> tuple[Tree, TapedPullback, Tree]:
    """Evaluate f, which returns ``(value, aux)``, and keep the graph: ``value, pullback, aux``."""
    leaves, form = optree.tree_flatten(primals)
    level, roots, boxes = _new_level(), list[VJPNode | None](), []
    for leaf in leaves:
        root = VJPNode.new_root() if is_float(leaf) else None
        roots.append(root)
        boxes.append(leaf if root is None else new_box(leaf, level, root))
    try:
        value, aux = f(*form.unflatten(boxes))
    except NotImplementedError as error:
        name_operation(error)
        raise
    results, ends = [], list[VJPNode | None]()
    outputs, form_out = optree.tree_flatten(value)
    for out in outputs:
        traced = isbox(out) and out._trace == level
        ends.append(out._node if traced else None)
        results.append(out._value if traced else out)
    extras, form_aux = optree.tree_flatten(aux)
    extras = [x._value if isbox(x) and x._trace == level else x for x in extras]
    pullback = TapedPullback(leaves, roots, form.unflatten, ends)
    return form_out.unflatten(results), pullback, form_aux.unflatten(extras)


@final
class _Use(Node):  # type: ignore[misc]
    """A node that only knows which leaves its value was computed from.

    autograd's list of functions without a derivative is one for each kind of node, and empty for this one, so
    that a rounding and a comparison are traced, too.
    """

    __slots__ = ("leaves",)

    def __init__(
        self, value: Any, fun: Any, args: Any, kwargs: Any, parent_argnums: Any, parents: list[_Use]
    ) -> None:
        self.leaves: set[int] = set().union(*(parent.leaves for parent in parents))

    def initialize_root(self, leaf: int) -> None:
        self.leaves = {leaf}


def uses(f: Callable[..., tuple[Tree, Tree]], primals: Tree) -> tuple[Tree, ...]:
    """Return for each primal a tree of booleans: is the value of f computed from the leaf?"""
    leaves, form = optree.tree_flatten(primals)
    level = _new_level()
    boxes = [new_box(x, level, _Use.new_root(i)) if is_float(x) else x for i, x in enumerate(leaves)]
    try:
        value, _ = f(*form.unflatten(boxes))
    except TypeError:  # autograd has no box for a single boolean
        return trace(f, primals)[1].reached
    outputs = [x._node for x in optree.tree_leaves(value) if isbox(x) and x._trace == level]
    used: set[int] = set().union(*(node.leaves for node in outputs))
    flags: Any = form.unflatten([i in used for i in range(len(leaves))])
    return tuple(flags)


def depth(x: Any) -> int:
    """Return how many derivatives are being taken through a value."""
    return len(_levels(x))


def zeros_with_pullback(y: Any, pull: Callable[[Any], Any]) -> Any:
    """Return zeros like y, whose pullback is ``pull``: it maps a cotangent of the zeros to one of y.

    ``pull`` may use values from the scope in which y was made. These may still be traced at the level that is
    being pulled back, and at levels above it that have ended; such traces are removed from the result.
    """
    levels = _levels(y)

    @primitive  # type: ignore[untyped-decorator]
    def zeros(y: Any) -> Any:
        return np.zeros(np.shape(y), y.dtype)

    def pullback(value: Any, y: Any) -> Callable[[Any], Any]:
        level = levels[-1 - len(_levels(y))]

        def at_level(g: Any) -> Any:
            cotangent, live = pull(g), _levels(g)
            while isbox(cotangent) and cotangent._trace >= level and cotangent._trace not in live:
                cotangent = cotangent._value
            if any(trace >= level and trace not in live for trace in _levels(cotangent)):
                raise UnsupportedOpError(
                    "forward mode through a linear solve is not available in NumPy: use reverse mode, or JAX"
                )
            return cotangent

        return at_level

    defvjp(zeros, pullback)
    return zeros(y)


def _levels(x: Any) -> list[int]:
    """Return the levels at which a value is traced, from the highest down."""
    return [x._trace, *_levels(x._value)] if isbox(x) else []


def zeros_like(x: Any) -> Any:
    """Return zeros of the shape and dtype of a leaf, which may be traced."""
    return vspace(x).zeros() if isbox(x) else np.zeros(np.shape(x), np.asarray(x).dtype)


def cast(x: Any, like: Any) -> Any:
    """Give a result the dtype of a leaf: autograd may return float64 for a float32 input."""
    dtype = like.dtype if hasattr(like, "dtype") else np.asarray(like).dtype
    if isbox(x):
        return x if x.dtype == dtype else x.astype(dtype)
    return np.asarray(x, dtype)
