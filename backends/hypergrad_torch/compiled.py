"""A whole estimate as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad.estimators import State
from hypergrad_torch.captured import settings
from hypergrad_torch.graph import detach, trees
from hypergrad_torch.randomness import tracing


class _Program(NamedTuple):
    """Compiled code, and how its results are put together."""

    run: Callable[..., list[Tensor]]
    assemble: Callable[[list[Tensor]], Any]


def compile(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:  # noqa: A001 - as torch.compile
    r"""Compile a function of trees of tensors with everything that it differentiates, as one program::

        estimate = hypergrad_torch.compile(estimator.estimate)
        out = estimate(problem, state, hparams, train_batch, val_batch)
        estimator.check(out)

    The function is traced once for each structure, shape, dtype and device of its arguments, through all of
    its derivatives, and the operations that it then consists of go to ``torch.compile``. (Compiling the
    loss alone does not work: compiled code has no second derivative.) Tensors are arguments; everything else,
    such as the problem and its functions, is a constant and has to be the same object from call to call. A
    `State`'s step is an argument, too. Where something changes that these functions hold, an option of an
    optimiser, the mode of a module, an array of NumPy or a number, the function is traced anew.

    Values cannot be read while tracing: faults come in the report, and ``estimator.check(out)`` raises them.
    Loops of solvers run to their limit. Draws inside of the losses come from the compiler's own generator,
    and are the same in the gradient and in its derivative.

    Args:
        f: ``estimator.estimate``, or any function that holds no tensors of its own.
        options: for ``torch.compile``.

    Raises:
        ArgumentError: if a loss or a batch function brings in tensors that are no arguments.
        UnsupportedOpError: for random draws in what replays them (`States`, `FiniteDifference`): give the
            noise in the batch.
    """
    programs: dict[Any, _Program] = {}

    @wraps(f)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_with_tensor_step(arg) for arg in args)
        kwargs = {name: _with_tensor_step(arg) for name, arg in kwargs.items()}
        leaves, unflatten = trees.flatten((args, kwargs))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        paths = tuple(trees.paths((args, kwargs), ""))
        key = tuple(map(_kind, leaves)), paths, _autocast(), settings((f, constants))
        if key not in programs:
            programs[key] = _trace(f, leaves, unflatten, tensors, options)
        program = programs[key]
        with torch.no_grad():
            return program.assemble(program.run(*tensors))

    return compiled


def _trace(
    f: Callable[..., Any], leaves: list[Any], unflatten: Any, tensors: list[Tensor], options: dict[str, Any]
) -> _Program:
    rebuild: list[Callable[[list[Tensor]], Any]] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        args, kwargs = unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves])
        results, unflatten_results = trees.flatten(detach(f(*args, **kwargs)))
        places = [isinstance(x, Tensor) for x in results]

        def assemble(tensors: list[Tensor]) -> Any:
            values = iter(tensors)
            filled = [next(values) if here else x for here, x in zip(places, results, strict=True)]
            return unflatten_results(filled)

        rebuild.append(assemble)
        return [x for x in results if isinstance(x, Tensor)]

    try:
        with tracing() as trace:
            graph = make_fx(flat, tracing_mode="fake")(*tensors)
    except Exception as error:
        if "convert all Tensors to FakeTensors first" in str(error):
            raise ArgumentError(
                "compile: a loss or a batch function holds tensors of its own, which a program would take "
                f"for constants: pass them in the batch ({error})"
            ) from error
        raise
    if trace.replayed and (draw := _first_draw(graph)):
        raise UnsupportedOpError(
            explain(
                f"compile: {draw} draws at random in a loss that is evaluated again with the same draws",
                "A compiled program cannot put its generator back.",
                ("draw before, and give the noise in the batch",),
            )
        )
    return _Program(torch.compile(graph, dynamic=False, **options), rebuild[-1])


def _first_draw(graph: fx.GraphModule) -> str | None:
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return str(node.target)
    return None


def _with_tensor_step(arg: Any) -> Any:
    """A state with its step as a tensor, so that every step runs the same program."""
    if isinstance(arg, State) and isinstance(arg.step, int):
        return arg._replace(step=torch.tensor(arg.step))
    return arg


def _autocast() -> Any:
    """The autocast modes, under which a program is compiled anew."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _kind(leaf: Any) -> Any:
    """What a program is compiled for: shape, strides, dtype and device of a tensor, or a constant's value."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    if isinstance(leaf, bool | int | float | complex | str):
        return type(leaf), repr(leaf)  # 1 is no 1.0, and 0.0 no -0.0
    try:
        hash(leaf)
    except TypeError:
        return _Identical(leaf)
    return leaf


class _Identical:
    """A constant that cannot be hashed, compared by identity."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identical) and other.held is self.held
