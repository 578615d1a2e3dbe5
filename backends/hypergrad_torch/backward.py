"""Custom functions, whose backward pass need not be the derivative of the forward one.

No graph shows whether it is, so each is compared with differences, in every loss until it agrees where it
matters. Agreement is that of one loss: what is wrong in a function may cancel there, or be too small to see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.backend import Tree
from hypergrad.errors import UnsupportedOpError, explain
from hypergrad_torch.autocast import full_precision
from hypergrad_torch.leaves import is_float
from hypergrad_torch.private import HookFunction, custom_function, is_symbolic, nodes_before
from hypergrad_torch.randomness import generators
from hypergrad_torch.unsupported import refuse_changes


class _Agreed(NamedTuple):
    """A custom function that agreed with a difference, in the first or second derivative of a loss.

    ``size``, the number of nodes in the graph of the loss, tells one loss from another.
    """

    function: Any
    second: bool
    size: int


_agreed: set[_Agreed] = set()

_MATTERS = 1e-3
"""How much of the derivative of a loss has to come through a custom function for agreement to count."""

_ROUNDINGS = 4
"""How many units in the last place of a value, a loss or a sum of gradients, are its rounding."""

_COARSEST = 1e-4
"""The machine epsilon above which differences say nothing of a derivative: that of float16 is 1e-3."""

Loss = Callable[[list[Any]], tuple[Tree, Tree]]
"""The leaves of θ and λ -> (value, aux)."""


def compare(loss: Loss, leaves: list[Any], customs: set[Any], second: bool, size: int) -> None:
    """Compare the derivative of a loss with a difference, if a custom function is new in it.

    Without ``second`` that is its gradient ∇C, against C. With ``second`` it is the derivative of the
    gradient that the backward pass gives, against that gradient: along one random direction d,

        (∂∇C)ᵀu · d   and   u · (∇C(x + εd) − ∇C(x − εd)) / 2ε

    Costs six evaluations of the loss, and as many gradients with ``second``, until a custom function has
    agreed in a loss in which it matters. They run without autocast. Where values cannot be read, nothing is
    compared.

    Raises:
        UnsupportedOpError: naming the custom functions, if the two differ by more than rounding explains, or
            if the parameters are of half precision, in which a comparison says nothing.
    """
    new = {kind for kind in customs if _Agreed(kind, second, size) not in _agreed}
    variables = [x for x in leaves if is_float(x)]
    if not new or not variables or any(x.is_meta or (is_symbolic(x) and not x.is_cuda) for x in variables):
        return
    eps = max(torch.finfo(x.dtype).eps for x in variables)
    if eps > _COARSEST:
        new -= {known.function for known in _agreed if known.second == second}
        if not new:
            return
        raise _too_coarse(new, next(x.dtype for x in variables if torch.finfo(x.dtype).eps == eps))
    with torch.enable_grad(), full_precision():
        generator = torch.Generator().manual_seed(0)
        directions = [_random(x, generator) for x in variables]
        judge = _second if second else _first
        analytic, at = judge(loss, leaves, directions, generator.manual_seed(1))
        near, far = at(eps ** (1 / 3)), at(2 * eps ** (1 / 3))
        fine = near.quotient
        scale = max(abs(analytic), abs(fine))
        # Tight, since the function may have a small part in this loss.
        tolerance = eps**0.5 * scale + 10 * abs(fine - far.quotient) + _ROUNDINGS * eps * near.size
        if abs(analytic - fine) > tolerance:
            # Near a jump, as that of a norm over two numbers, smaller steps come nearer; else they do not.
            if any(
                abs(analytic - at(eps ** (1 / 3) / k).quotient) < abs(analytic - fine) / 2
                for k in (4, 16, 64)
            ):
                return
            raise _wrong(new, second, analytic, fine)
        # Agreement says something of a function only if its backward pass matters in this loss, by more than
        # the comparison would overlook.
        for kind in new:
            changed, _ = judge(
                partial(_with_changed, loss, kind), leaves, directions, generator.manual_seed(1)
            )
            if abs(changed - analytic) > max(_MATTERS * scale, 20 * tolerance):
                _agreed.add(_Agreed(kind, second, size))


class _Difference(NamedTuple):
    """(f(x + εd) − f(x − εd)) / 2ε, and (|f(x + εd)| + |f(x − εd)|) / 2ε, of which rounding takes a share.

    Where f is a sum, |f| is that of its terms.
    """

    quotient: float
    size: float


_Judge = tuple[float, Callable[[float], _Difference]]
"""The derivative by the backward pass, and ε -> the difference."""


def _first(loss: Loss, leaves: list[Any], directions: list[Tensor], generator: torch.Generator) -> _Judge:
    gradients = _gradients(loss, leaves)[1]

    def value(step: float) -> float:
        # The leaves require grad as ever: losses may ask.
        return float(_evaluate(loss, _variables(_moved(leaves, directions, step))).detach())

    def at(step: float) -> _Difference:
        after, before = value(step), value(-step)
        return _Difference((after - before) / (2 * step), (abs(after) + abs(before)) / (2 * step))

    return _dot(gradients, directions), at


def _second(loss: Loss, leaves: list[Any], directions: list[Tensor], generator: torch.Generator) -> _Judge:
    inputs, gradients = _gradients(loss, leaves, graph=True)
    weights = [torch.randn(g.shape, generator=generator).to(g) for g in gradients]
    total = sum((u * g).sum() for u, g in zip(weights, gradients, strict=True))
    pulled: Sequence[Tensor | None] = [None] * len(inputs)
    if isinstance(total, Tensor) and total.requires_grad:
        pulled = torch.autograd.grad(total, inputs, allow_unused=True)

    def at(step: float) -> _Difference:
        after, before = (_gradients(loss, _moved(leaves, directions, e))[1] for e in (step, -step))
        quotient = (_dot(after, weights) - _dot(before, weights)) / (2 * step)
        return _Difference(quotient, (_sizes(after, weights) + _sizes(before, weights)) / (2 * step))

    return _dot(pulled, directions), at


def _gradients(loss: Loss, leaves: list[Any], graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    made = _variables(leaves)
    inputs = [x for x in made if is_float(x)]
    value = _evaluate(loss, made)
    for node in nodes_before([value.grad_fn] if value.grad_fn is not None else []):
        if custom_function(node.__class__) is HookFunction:
            refuse_changes(node)  # otherwise the custom function would be blamed
    found = torch.autograd.grad(value, inputs, create_graph=graph, allow_unused=True)
    return inputs, [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _with_changed(loss: Loss, kind: Any, leaves: list[Any]) -> tuple[Tree, Tree]:
    """The loss, with the backward pass of one custom function doubled."""
    value, aux = loss(leaves)
    for node in nodes_before([value.grad_fn]):
        if custom_function(node.__class__) is kind:
            node.register_hook(_doubled)
    return value, aux


def _doubled(after: Sequence[Any], before: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if g is None else 2 * g for g in after)


def _variables(leaves: list[Any]) -> list[Any]:
    return [x.detach().requires_grad_() if is_float(x) else x for x in leaves]


def _evaluate(loss: Loss, leaves: list[Any]) -> Tensor:
    with generators.replay(generators.state()):
        value: Tensor = loss(leaves)[0]
    return value


def _moved(leaves: list[Any], directions: list[Tensor], step: float) -> list[Any]:
    each = iter(directions)
    return [x.detach() + step * next(each) if is_float(x) else x for x in leaves]


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    size = x.detach().square().mean().sqrt() if x.numel() else 0.0
    direction = torch.randn(x.shape, generator=generator).to(x)
    return direction * size if size > 0 else direction


def _dot(xs: Sequence[Tensor | None], ys: Sequence[Tensor]) -> float:
    return sum(float((x.detach() * y).sum()) for x, y in zip(xs, ys, strict=True) if x is not None)


def _sizes(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return _dot([x.abs() for x in xs], [y.abs() for y in ys])


def _too_coarse(new: set[Any], dtype: torch.dtype) -> UnsupportedOpError:
    names = ", ".join(sorted(kind.__name__ for kind in new))
    return UnsupportedOpError(
        explain(
            f"differences in {dtype} are too coarse to judge the custom "
            f"function{'s'[: len(new) > 1]} {names} by",
            "Nothing shows whether the backward pass is the derivative of the forward pass.",
            (
                "take one estimate in float32 first, in which the function matters: its agreement counts",
                "keep the parameters in float32 and use torch.autocast",
            ),
        )
    )


def _wrong(new: set[Any], second: bool, analytic: float, difference: float) -> UnsupportedOpError:
    names = ", ".join(sorted(kind.__name__ for kind in new))
    what = "second derivative" if second else "gradient"
    return UnsupportedOpError(
        explain(
            f"with the custom function{'s'[: len(new) > 1]} {names} the {what} of the loss is "
            f"{analytic:.6g} along a direction where differences give {difference:.6g}",
            "Their backward pass is not the derivative of the forward pass, and the hypergradient would be "
            "wrong.",
            (
                "save inputs and outputs alone, and write backward as the derivative of forward, in "
                "differentiable operations: what else is saved or kept on ctx has no graph",
                "another gradient is meant, such as straight-through or reversed: write it with detach, "
                "z + (round(z) − z).detach() or (2 * z).detach() − z",
            ),
        )
    )
