"""What an update rule is, and how it reads its own hyperparameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, final

from hypergrad.backend import Array, Backend, Scalar, Tree, loaded
from hypergrad.errors import ArgumentError


@final
@dataclass(frozen=True)
class Schedule:
    """A hyperparameter of an update rule that changes over training: ``f(hparams, step)``.

    ``Schedule(lambda h, t: h["lr"] * 0.99**t)`` decays a learned rate;
    ``Schedule(lambda h, t: h["lr"][t])`` learns a rate for each step.
    """

    f: Callable[[Tree, Any], Scalar]


Hyper = float | Callable[[Tree], Scalar] | Schedule
"""A number, a function of the hyperparameters, or a `Schedule`."""


class UpdateRule(ABC):
    """The optimiser's part of the update map Φ.

    An update is a differentiable function of everything that it takes: the gradient, its own state,
    the parameters and the hyperparameters.
    """

    leafwise: ClassVar[bool] = False
    """Is each leaf moved by its own gradient alone, so that one that is not finite shows in that leaf?"""

    @property
    def formula(self) -> UpdateRule:
        """The rule itself, or that of this library which an optimiser of a framework stands for."""
        return self

    @abstractmethod
    def init(self, backend: Backend, params: Tree) -> Tree:
        """The optimiser's state before the first step."""

    @abstractmethod
    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        """Return the new parameters and the new optimiser state; ``step`` counts from 0."""


@final
@dataclass(frozen=True)
class CustomUpdate(UpdateRule):
    """An ``(init, update)`` pair of the user's.

    ``init(params) -> opt_state`` and ``update(gradient, opt_state, params, hparams) -> (params,
    opt_state)``, in operations that the backend differentiates.
    """

    init_fn: Callable[[Tree], Tree]
    update_fn: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]

    def init(self, backend: Backend, params: Tree) -> Tree:
        return self.init_fn(params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        return self.update_fn(gradient, opt_state, params, hparams)


class TorchOptimizer(Protocol):
    """What this library takes for a ``torch.optim`` optimiser, for type checkers."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = ...) -> None: ...


Updates = UpdateRule | TorchOptimizer | tuple[Callable[..., Any], Callable[..., Any]]
"""An update rule of this library, an optimiser of a framework, or a pair ``(init, update)``."""

_OPTIMISERS: dict[str, Callable[[Any], UpdateRule]] = {}


def register_optimiser(name: str, make: Callable[[Any], UpdateRule]) -> None:
    """Let `as_update_rule` take the optimisers of a framework.

    Args:
        name: of their class, by the package that it comes from: ``"torch.Optimizer"``. A name, so that the
            package need not be imported.
        make: an optimiser -> the update rule of its step.
    """
    _OPTIMISERS[name] = make


def _name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def as_update_rule(update: Updates) -> UpdateRule:
    """Take an update rule as it is, an optimiser of a framework as its backend registered it, and an
    ``(init, update)`` pair of functions as a `CustomUpdate`.

    Raises:
        ArgumentError: if it is none of these.
    """
    if isinstance(update, UpdateRule):
        return update
    loaded()  # a framework that is imported has its backend imported now, which registers its optimisers
    for kind in type(update).__mro__:
        if (make := _OPTIMISERS.get(_name(kind))) is not None:
            return make(update)
    if isinstance(update, tuple) and len(update) == 2 and all(callable(part) for part in update):
        return CustomUpdate(*update)
    raise ArgumentError(
        f"{update!r} is no update rule: give hg.SGD, hg.Adam, hg.AdamW, hg.RMSprop, hg.Adagrad, an optimiser "
        "of the framework, or a pair (init, update)"
    )


def resolve(backend: Backend, name: str, hyper: Hyper, hparams: Tree, step: Any) -> Scalar:
    """Read a hyperparameter of an update rule at one step.

    Raises:
        ArgumentError: if a function returned something that is not a scalar, which would otherwise
            broadcast against the parameters.
    """
    if isinstance(hyper, Schedule):
        value = hyper.f(hparams, step)
    elif callable(hyper):
        value = hyper(hparams)
    else:
        return hyper
    if backend.owns(value) and backend.describe(value).shape != ():
        raise ArgumentError(
            f"{name} is a function that returned shape {backend.describe(value).shape}, not ()"
        )
    return value


def is_off(hyper: Hyper) -> bool:
    """Is a term switched off for good? A function of the hyperparameters never is."""
    return isinstance(hyper, int | float) and hyper == 0


def check_range(rule: str, name: str, hyper: Hyper, low: float, high: float) -> None:
    """Check a hyperparameter that is given as a number: low ≤ value < high.

    Raises:
        ArgumentError: if it is outside, or neither a number, a function nor a `Schedule`.
    """
    if isinstance(hyper, Schedule) or callable(hyper):
        return
    if isinstance(hyper, bool) or not isinstance(hyper, int | float) or not low <= hyper < high:
        raise ArgumentError(
            f"{rule}: {name} = {hyper!r}; it is a number in [{low:g}, {high:g}), a function of the "
            "hyperparameters, or a Schedule"
        )


def clock(backend: Backend, step: Any, params: Tree) -> Any:
    """The step as a number to compute with: a traced integer in the dtype of the parameters.

    Frameworks turn an integer times a number into their default dtype, which may be too narrow.
    """
    if isinstance(step, int):
        return step
    return step * backend.asarray(1.0, like=backend.flatten(params)[0][0])


def safe_sqrt(backend: Backend, x: Array) -> Array:
    r"""Square root whose derivative at 0 is taken as 0, where √x has none.

    Adam and RMSprop divide m by √s + ε with s = Σ w_i g_i² and m = Σ u_i g_i over past gradients. Where
    s = 0 all of them were 0, so m = 0 too, and

        d[m / (√s + ε)] = dm / ε − m d√s / ε² = dm / ε

    whatever bounded slope √s is given: the derivative that comes out is exact, and not NaN.
    """
    xp = backend.xp
    positive = x > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, x, xp.ones_like(x))), xp.zeros_like(x))
