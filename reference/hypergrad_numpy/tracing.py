"""Derivatives of functions of trees, on the tracer of HIPS autograd.

``autograd.make_vjp`` differentiates by one argument and warns when it finds no path. Hypergradients
need more: several trees at one linearisation, a pullback that can be called many times, the knowledge
of which leaves the graph reaches, and what the graph holds in memory. The nodes, the rules for each
operation and the order of the backward pass are autograd's own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import optree
from autograd.core import VJPNode, add_outgrads, defvjp, vspace
from autograd.tracer import isbox, new_box, notrace_primitives, primitive, trace_stack
from autograd.util import toposort

from hypergrad.backend import Pullback, Tree
from hypergrad.errors import UnsupportedOpError

_lock = threading.Lock()


def _new_level() -> int:
    """A level above all traces so far, so that nested and concurrent traces never meet."""
    with _lock:
        trace_stack.top += 1
        level: int = trace_stack.top
        return level


@final
class _Node(VJPNode):  # type: ignore[misc]
    """A node that enters the arrays it keeps into the ledger of its trace."""

    __slots__ = ("ledger",)

    def __init__(
        self, value: Any, fun: Any, args: Any, kwargs: Any, parent_argnums: Any, parents: Any
    ) -> None:
        VJPNode.__init__(self, value, fun, args, kwargs, parent_argnums, parents)
        self.ledger: dict[int, weakref.ref[Any]] = parents[0].ledger
        for array in (value, *args):
            if isinstance(array, np.ndarray):
                owner = array.base if isinstance(array.base, np.ndarray) else array
                self.ledger[id(owner)] = weakref.ref(owner)


# Comparisons, roundings and their kin pass a trace by; autograd keeps them in a set for each node type.
notrace_primitives[_Node] = notrace_primitives[VJPNode]


@final
class _Sink:
    """The end of a graph with several outputs."""

    def __init__(self, parents: list[_Node]) -> None:
        self.parents = parents


@final
class TapedPullback(Pullback):
    """u ↦ uᵀ ∂f/∂primals, along the nodes that autograd's tracer made."""

    def __init__(
        self,
        leaves: list[Any],
        roots: list[_Node | None],
        unflatten: Callable[[Sequence[Any]], tuple[Tree, ...]],
        ends: list[_Node | None],
        ledger: dict[int, weakref.ref[Any]],
    ) -> None:
        self._leaves, self._roots, self._unflatten = leaves, roots, unflatten
        self._ends, self._ledger = ends, ledger
        sink = _Sink([end for end in ends if end is not None])
        self._order: list[_Node] = list(toposort(sink))[1:]

    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        gradients: dict[_Node, tuple[Any, bool]] = {}
        for end, g in zip(self._ends, _flatten(cotangent)[0], strict=True):
            if end is not None:
                gradients[end] = add_outgrads(gradients.get(end), g)
        for node in self._order:
            if node.parents:
                outgoing, _ = gradients.pop(node)
                for parent, g in zip(node.parents, node.vjp(outgoing), strict=False):
                    gradients[parent] = add_outgrads(gradients.get(parent), g)
        return self._unflatten(
            [
                _zeros_like(leaf) if root not in gradients else _cast(gradients[root][0], leaf)
                for leaf, root in zip(self._leaves, self._roots, strict=True)
            ]
        )

    @property
    def reached(self) -> tuple[Tree, ...]:
        nodes = set(self._order)
        return self._unflatten([root in nodes for root in self._roots])

    @property
    def nbytes(self) -> int:
        arrays = (reference() for reference in list(self._ledger.values()))
        return sum(array.nbytes for array in arrays if array is not None)


def trace(
    f: Callable[..., tuple[Tree, Tree]], primals: tuple[Tree, ...], differentiable: Callable[[Any], bool]
) -> tuple[Tree, Pullback, Tree]:
    """Evaluate f, which returns ``(value, aux)``, and keep the graph of its value: ``value, pullback,
    aux``.
    """
    leaves, unflatten = _flatten(primals)
    level = _new_level()
    ledger: dict[int, weakref.ref[Any]] = {}

    def root() -> _Node:
        node: _Node = _Node.new_root()
        node.ledger = ledger
        return node

    roots = [root() if differentiable(leaf) else None for leaf in leaves]
    boxes = [
        leaf if node is None else new_box(leaf, level, node) for leaf, node in zip(leaves, roots, strict=True)
    ]
    value, aux = f(*unflatten(boxes))
    outputs, rebuild = _flatten(value)
    extras, rebuild_aux = _flatten(aux)
    ends = [out._node if isbox(out) and out._trace == level else None for out in outputs]
    return (
        rebuild([_unbox(out, level) for out in outputs]),
        TapedPullback(leaves, roots, unflatten, ends, ledger),
        rebuild_aux([_unbox(out, level) for out in extras]),
    )


def depth(x: Any) -> int:
    """How many derivatives pass through this value?"""
    return len(_levels(x))


def zeros_with_pullback(y: Any, pull: Callable[[Any], Any]) -> Any:
    """Zeros like y, whose cotangent ``pull`` takes to one of y.

    The pullback may use values that it found where y was made. At the level that is being pulled back, and at
    those above that are done with, these are still traced, and their results are cut off again.
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
                    "forward mode through a linear solve has no formula in NumPy: take reverse mode, or JAX"
                )
            return cotangent

        return at_level

    defvjp(zeros, pullback)
    return zeros(y)


def _levels(x: Any) -> list[int]:
    """The levels at which a value is traced, from the highest down."""
    return [x._trace, *_levels(x._value)] if isbox(x) else []


def _flatten(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    leaves, spec = optree.tree_flatten(tree)
    return leaves, spec.unflatten


def _unbox(x: Any, level: int) -> Any:
    return x._value if isbox(x) and x._trace == level else x


def _zeros_like(x: Any) -> Any:
    return vspace(x).zeros() if isbox(x) else np.zeros(np.shape(x), np.asarray(x).dtype)


def _cast(g: Any, leaf: Any) -> Any:
    """Give a derivative the dtype of its leaf: autograd may return float64 for a float32 input."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if isbox(g):
        return g if g.dtype == dtype else g.astype(dtype)
    return np.asarray(g, dtype)
