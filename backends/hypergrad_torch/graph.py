"""Derivatives of functions of trees of tensors, on torch's own autograd graph.

Reverse mode alone, nested as deep as one likes: it is right wherever torch has a formula, while the
forward modes of torch 2.13 are silently wrong through ``layer_norm`` and ``batch_norm``. A pullback is
``torch.autograd.grad`` on a graph that is kept, never ``backward(create_graph=True)``, which ties
parameters and graph into a cycle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from hypergrad.backend import Pullback, Tree
from hypergrad.backend.trees import Trees
from hypergrad.errors import DisconnectedError, explain
from hypergrad_torch.backward import compare
from hypergrad_torch.leaves import is_fixed, is_float
from hypergrad_torch.private import Node, hook_unwatched, nodes_before, saved_bytes, watch_hooks
from hypergrad_torch.recompute import refuse_other_tensors
from hypergrad_torch.slopes import History
from hypergrad_torch.unsupported import changing_hook, refuse_undifferentiable, same, translated

trees = Trees()

_EDGES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
"""Does ``torch.autograd.grad`` take edges as outputs?"""


class _Nesting(threading.local):
    """How many derivatives this thread is taking around the one that it is asked for."""

    depth = 0


_nesting = _Nesting()


def nested() -> bool:
    """Is an outer derivative being taken, so that results must stay attached to its graph?"""
    return _nesting.depth > 0


@contextmanager
def one_deeper() -> Iterator[None]:
    """Inside this block one more derivative is being taken: results stay attached to their graph."""
    _nesting.depth += 1
    try:
        with torch.enable_grad(), translated():
            yield
    finally:
        _nesting.depth -= 1


class _End(NamedTuple):
    """An output of a graph: the tensor, or its edge in the graph alone, which does not keep its values."""

    root: Any
    node: Node
    dtype: torch.dtype
    shape: torch.Size

    def cotangent(self, g: Tensor) -> Tensor:
        """A cotangent in the dtype and shape of the tensor."""
        fits = g.dtype is self.dtype and g.shape == self.shape
        return g if fits else g.to(self.dtype).expand(self.shape)


def _end(x: Any) -> _End | None:
    """The output to pull back from; ``None`` if the value is no float or depends on nothing."""
    if not (is_float(x) and x.requires_grad):
        return None
    keep = nested() or x.grad_fn is None or not _EDGES or torch.compiler.is_compiling()
    root = x if keep else torch.autograd.graph.get_gradient_edge(x)
    return _End(root, _node(x), x.dtype, x.shape)


@final
class GraphPullback(Pullback):
    """u ↦ uᵀ ∂f/∂primals, by ``torch.autograd.grad`` on a graph that is kept."""

    def __init__(
        self, inputs: list[Any], outputs: list[Any], unflatten: Callable[[Sequence[Any]], tuple[Tree, ...]]
    ) -> None:
        self._inputs, self._outputs, self._unflatten = inputs, [_end(x) for x in outputs], unflatten

    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        return self._unflatten(self._pull(cotangent, self._inputs))

    def last(self, cotangent: Tree) -> tuple[Tree, ...]:
        return self._unflatten(self._pull(cotangent, self._inputs, keep=nested()))

    def onto(self, k: int) -> Callable[[Tree], Tree]:
        leaves, unflatten = trees.flatten(self._unflatten(self._inputs)[k])
        return lambda cotangent: unflatten(self._pull(cotangent, leaves))

    def _pull(self, cotangent: Tree, inputs: list[Any], keep: bool = True) -> list[Any]:
        """Cotangents of the inputs. Torch visits only nodes from which an input can be reached."""
        pairs = [
            (end.root, end.cotangent(g))
            for end, g in zip(self._outputs, trees.flatten(cotangent)[0], strict=True)
            if end is not None
        ]
        variables = [leaf for leaf in inputs if is_float(leaf)]
        gradients: Sequence[Tensor | None] = [None] * len(variables)
        if pairs and variables:
            roots, weights = zip(*pairs, strict=True)
            with translated():
                gradients = torch.autograd.grad(
                    roots, variables, weights, retain_graph=keep, create_graph=nested(), allow_unused=True
                )
        each = iter(gradients)
        return [_or_zeros(next(each), x) if is_float(x) else _zeros(x) for x in inputs]

    @cached_property
    def _history(self) -> History:
        # The inputs of an inner derivative have a history of their own, which is not that of the function.
        inputs = {x.grad_fn for x in self._inputs if isinstance(x, Tensor) and x.grad_fn is not None}
        return History.of([end.node for end in self._outputs if end is not None], inputs)

    @cached_property
    def reached(self) -> tuple[Tree, ...]:
        return self._unflatten(reached_by(self._inputs, self._history.sloped))

    @property
    def used(self) -> tuple[Tree, ...]:
        """Like `reached`, but inputs that pass only through operations without a slope count, too."""
        return self._unflatten(reached_by(self._inputs, self._history.nodes))

    @cached_property
    def nbytes(self) -> int:
        return saved_bytes(self._history.nodes)


def history(outputs: Sequence[Any]) -> set[Node]:
    """Every node of the graph from some outputs back to where it begins."""
    return nodes_before([_node(x) for x in outputs if is_float(x) and x.requires_grad])


def vjp(f: Callable[..., tuple[Tree, Tree]], primals: tuple[Tree, ...]) -> tuple[Tree, GraphPullback, Tree]:
    """Evaluate f, which returns ``(value, aux)``, and keep its graph: ``value, pullback, aux``.

    At the outermost level everything returned is a constant, whatever the tensors given require: nothing
    of the caller's graph is entered, and nothing of this one outlives the pullback. Inside another
    derivative value and aux stay attached to it.
    """
    leaves, unflatten = trees.flatten(primals)
    inner = nested()
    inputs = [_variable(leaf, inner) if is_float(leaf) else leaf for leaf in leaves]
    with one_deeper():
        value, aux = f(*unflatten(inputs))
    pullback = GraphPullback(inputs, trees.flatten(value)[0], unflatten)
    if inner or (isinstance(value, Tensor) and value.numel() == 1):
        refuse_other_tensors(pullback._history.nodes)
        second = inner and any(x.requires_grad for x in leaves if is_float(x))
        if customs := refuse_undifferentiable(pullback._history.nodes, inner, second):
            with one_deeper():  # so that hooks are watched
                compare(
                    lambda leaves: f(*unflatten(leaves)), leaves, customs, inner, len(pullback._history.nodes)
                )
    if inner:
        pullback._history.cut_flat()
        return value, pullback, aux
    return detach(value), pullback, detach(aux)


def detach(tree: Tree) -> Tree:
    """The same values outside of every graph; frozen parameters as they are."""
    return trees.map(lambda x: x.detach() if isinstance(x, Tensor) and not is_fixed(x) else x, tree)


def depth(leaf: Any) -> int:
    """At most how many derivatives pass through this leaf?"""
    return max(_nesting.depth, 1) if isinstance(leaf, Tensor) and leaf.requires_grad else 0


def zeros_with_pullback(y: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
    """Zeros like y, whose cotangent ``pull`` takes to one of y."""

    def hook(g: Tensor) -> Tensor:
        # With create_graph a further derivative is coming, for which the pullback has to stay attached.
        with one_deeper() if torch.is_grad_enabled() else nullcontext():
            return pull(g)

    zeros = y - y.detach()
    if zeros.requires_grad:
        hook_unwatched(zeros, hook)
    return zeros


def _variable(leaf: Tensor, inner: bool) -> Tensor:
    """A tensor to differentiate by: a new leaf, or an alias where an outer derivative passes through."""
    if leaf.is_inference() or torch.is_inference_mode_enabled():
        raise DisconnectedError(
            explain(
                "a derivative was asked for under torch.inference_mode",
                "Tensors made there carry no graph, and no derivative can be taken by them.",
                (
                    "the call stands inside `torch.inference_mode()`: move it out, or use `torch.no_grad()`, "
                    "under which estimates work",
                    "params or hparams were made there: pass `tensor.clone()`, taken outside of it",
                ),
            ),
            "params",
        )
    if inner and leaf.requires_grad:
        return leaf.view_as(leaf)
    return leaf.detach().requires_grad_()


def reached_by(inputs: Sequence[Any], nodes: set[Node]) -> list[bool]:
    """Which inputs are in a history?"""
    return [is_float(x) and x.requires_grad and _node(x) in nodes for x in inputs]


def _node(x: Tensor) -> Node:
    """The node that made a tensor; for a leaf the one at which its gradient arrives."""
    return x.grad_fn or torch.autograd.graph.get_gradient_edge(x).node


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else type(leaf)(0)


def _or_zeros(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, requires_grad=False) if gradient is None else gradient


def _guarded(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any] | None:
    """A hook that a loss registers, as one that may look at gradients and not change them."""
    if not nested():
        return None

    def looking(g: Tensor) -> None:
        changed = hook(g)
        if changed is not None and changed is not g and not same(changed, g):
            raise changing_hook("a hook of a tensor, registered inside of a loss,")

    return looking


watch_hooks(_guarded)
