"""Update rules that are one formula for every number, and how they read their own hyperparameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, final

from hypergrad.backend import Array, Backend, Scalar, Tree
from hypergrad.errors import ArgumentError
from hypergrad.updates.base import UpdateRule


@final
@dataclass(frozen=True)
class Schedule:
    """A hyperparameter of an update rule that changes over training: ``f(hparams, step)``.

    ``Schedule(lambda h, t: h["lr"] * 0.99**t)`` decays a learned rate;
    ``Schedule(lambda h, t: h["lr"][t])`` learns a rate for each step.
    """

    f: Callable[[Tree, Any], Tree]


Hyper = float | Callable[[Tree], Tree] | Schedule
"""A number, a function of the hyperparameters, or a `Schedule`.

Both of the latter return a scalar, or a tree of rates: like the parameters, or like the upper levels of their
tree. Its leaves are scalars, or arrays of the shape of their parameter, which hold a rate for each number.
"""


class Formula(UpdateRule):
    """A rule that updates each number of the parameters by its own gradient alone.

    To write one, name its hyperparameters and implement `step`, in which they are values: scalars, or arrays
    of the shape of the only leaf. A state is a named tuple of trees like the parameters, or of ``()``.
    """

    leafwise: ClassVar[bool] = True
    connected = True
    hypers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def step(
        self, backend: Backend, rates: Any, gradient: Tree, opt_state: Tree, params: Tree, t: Any
    ) -> tuple[Tree, Tree]:
        """Return what `update` does; ``rates`` has the values of the rule's hyperparameters at step t."""

    @final
    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        values = {name: value_of(getattr(self, name), hparams, step) for name in self.hypers}
        if all(_is_scalar(backend, value) for value in values.values()):
            return self.step(backend, SimpleNamespace(**values), gradient, opt_state, params, step)
        return self._leaf_by_leaf(backend, values, gradient, opt_state, params, step)

    def _leaf_by_leaf(
        self, backend: Backend, values: dict[str, Tree], gradient: Tree, state: Tree, params: Tree, t: Any
    ) -> tuple[Tree, Tree]:
        """Take the step of each leaf with the rates of its own."""
        leaves, unflatten = backend.flatten(params)
        slopes = backend.flatten(gradient)[0]
        kept = [backend.flatten(part)[0] for part in state]
        each = {name: _one_a_leaf(backend, name, value, params) for name, value in values.items()}
        for i, (theta, g) in enumerate(zip(leaves, slopes, strict=True)):
            own = _rebuilt(state, [[part[i]] if part else () for part in kept])
            rates = SimpleNamespace(**{name: rates[i] for name, rates in each.items()})
            (leaves[i],), own = self.step(backend, rates, [g], own, [theta], t)
            for part, new in zip(kept, own, strict=True):
                if part:
                    (part[i],) = new
        return unflatten(leaves), _rebuilt(state, [unflatten(part) if part else () for part in kept])


def _rebuilt(state: Tree, parts: list[Tree]) -> Tree:
    return type(state)(*parts) if hasattr(state, "_fields") else state


def _one_a_leaf(backend: Backend, name: str, value: Tree, params: Tree) -> list[Any]:
    """Return the rate of each leaf of the parameters.

    Raises:
        ArgumentError: if the tree of rates does not fit the parameters.
    """
    leaves, paths = backend.flatten(params)[0], backend.paths(params, "params")
    if _is_scalar(backend, value):
        return [value] * len(leaves)
    try:
        spread = backend.map(lambda rate, part: backend.map(lambda _: rate, part), value, params)
        rates: list[Any] = backend.flatten(spread)[0]
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(
            f"{name} is a function, and what it returns does not fit the parameters: return a scalar, or a "
            "rate for each of " + ", ".join(paths)
        ) from error
    for path, rate, leaf in zip(paths, rates, leaves, strict=True):
        if backend.owns(rate) and (shape := backend.describe(rate).shape) not in (
            (),
            backend.describe(leaf).shape,
        ):
            raise ArgumentError(
                f"{name} is a function and returned shape {shape} for {path}, not () and not the shape "
                f"{backend.describe(leaf).shape} of the parameter"
            )
    return rates


def _is_scalar(backend: Backend, value: Any) -> bool:
    return isinstance(value, float | int) or (backend.owns(value) and backend.describe(value).shape == ())


def value_of(hyper: Hyper, hparams: Tree, step: Any) -> Tree:
    """Return the value of a hyperparameter of an update rule at one step."""
    if isinstance(hyper, Schedule):
        return hyper.f(hparams, step)
    return hyper(hparams) if callable(hyper) else hyper


def scalar_of(backend: Backend, name: str, hyper: Hyper, hparams: Tree, step: Any) -> Scalar:
    """Return the value of a hyperparameter at one step, where a tree of rates cannot be used.

    Raises:
        ArgumentError: if it is one.
    """
    value = value_of(hyper, hparams, step)
    if not _is_scalar(backend, value):
        raise ArgumentError(
            f"{name} must be one rate for all parameters here, not a tree or an array of them"
        )
    return value


def is_off(hyper: Hyper) -> bool:
    """Return whether a term is permanently off: the number 0, and never a function or a `Schedule`."""
    return isinstance(hyper, int | float) and hyper == 0


def check_range(rule: str, name: str, hyper: Hyper, low: float, high: float) -> None:
    """Check a hyperparameter that is given as a number: low ≤ value < high.

    Raises:
        ArgumentError: if it is out of range, or neither a number, a function nor a `Schedule`.
    """
    if isinstance(hyper, Schedule) or callable(hyper):
        return
    if isinstance(hyper, bool) or not isinstance(hyper, int | float) or not low <= hyper < high:
        raise ArgumentError(
            f"{rule}: {name} = {hyper!r}; it must be a number in [{low:g}, {high:g}), a function of the "
            "hyperparameters, or a Schedule"
        )


def clock(backend: Backend, step: Any, params: Tree) -> Any:
    """Return the step as a number to compute with: a traced integer in the widest dtype of the parameters.

    Frameworks give an integer times a Python number their default dtype, which may be too narrow.
    """
    if isinstance(step, int):
        return step
    widest = max(backend.flatten(params)[0], key=lambda leaf: backend.describe(leaf).itemsize)
    return step * backend.asarray(1.0, like=widest)


def fitted(backend: Backend, number: Any, leaf: Array) -> Any:
    """Return a number that `clock` led to in the dtype of a leaf, which it would widen."""
    return backend.cast(number, backend.describe(leaf).dtype) if backend.owns(number) else number


def safe_sqrt(backend: Backend, x: Array) -> Array:
    r"""Return √x with a derivative of 0 at x = 0, where √x has none.

    Adam and RMSprop divide m by √s + ε with s = Σ w_i g_i² and m = Σ u_i g_i over past gradients. Where
    s = 0 all of them were 0, so m = 0 too, and

        d[m / (√s + ε)] = dm / ε − m d√s / ε² = dm / ε

    whatever bounded slope is assumed for √s: the result is exact, where it would otherwise be NaN.
    """
    xp = backend.xp
    positive = x > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, x, xp.ones_like(x))), xp.zeros_like(x))
