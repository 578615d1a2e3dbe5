"""The interface of update rules, and which objects are taken for one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Protocol, final

from hypergrad.backend import Backend, Tree, loaded
from hypergrad.backend.arguments import check_same
from hypergrad.errors import ArgumentError, DisconnectedError, explain


class UpdateRule(ABC):
    """The optimiser's part of the update map Φ.

    An update is a differentiable function of everything that it takes: the gradient, its own state,
    the parameters and the hyperparameters.
    """

    leafwise: ClassVar[bool] = False
    """Is each leaf updated by its own gradient alone, so that a non-finite gradient shows in that leaf?"""

    connected: bool = False
    """Is it known that the update depends on the gradient differentiably, so that no graph need show it?"""

    @property
    def formula(self) -> UpdateRule:
        """The rule itself; for a framework's optimiser, the rule of this library with the same formula."""
        return self

    @abstractmethod
    def init(self, backend: Backend, params: Tree) -> Tree:
        """Return the optimiser state before the first step."""

    @abstractmethod
    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        """Return the new parameters and the new optimiser state; ``step`` counts from 0."""

    @final
    def checked(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        """Return what `update` does, and check that nothing has another structure, shape or dtype.

        Raises:
            ArgumentError: if the update changes a shape, or the state was made for other parameters.
            LeafTypeError: if the update changes a dtype.
        """
        name = type(self).__name__
        try:
            new_params, new_state = self.update(backend, gradient, opt_state, params, hparams, step)
        except Exception:
            # The likely cause is an optimiser state that was made for other parameters: say so. A rule
            # whose state begins empty cannot have failed for this reason.
            fresh = self.init(backend, params)
            if backend.flatten(fresh)[0]:
                check_same(backend, name, opt_state, "opt_state", fresh)
            raise
        check_same(backend, name, new_params, "params", params)
        if any(map(backend.is_fixed, backend.flatten(params)[0])):
            new_params = backend.map(
                lambda new, old: old if backend.is_fixed(old) else new, new_params, params
            )
        check_same(backend, name, new_state, "opt_state", opt_state)
        return new_params, new_state

    def check_connected(
        self, backend: Backend, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> None:
        """Check that the new parameters depend on the gradient, as the graph of an update shows.

        Raises:
            DisconnectedError: if no leaf does: every hyperparameter of the loss would have no response.
        """
        if self.connected:
            return

        def update(gradient: Tree) -> Tree:
            # Of copies, in case the rule changes them in place.
            kept, theta = backend.copy((opt_state, params))
            return self.checked(backend, gradient, kept, theta, hparams, step)[0]

        with backend.random.replay(backend.random.state()):
            _, pullback = backend.pullback(update, params)  # any gradient has this graph
        if not any(backend.flatten(pullback.reached[0])[0]):
            raise DisconnectedError(
                explain(
                    f"the parameters after the update of {self!r} do not depend on the gradient",
                    "No hyperparameter of the training loss could have an effect, and its hypergradient "
                    "would be zero.",
                    (
                        "the update runs without a graph: remove torch.no_grad, .data, detach or "
                        "jax.lax.stop_gradient from it, and for NumPy use autograd.numpy",
                        "it changes the parameters in place, or calls another library: write it as a "
                        "function that returns new ones",
                        'leave the optimiser out: hg.Greedy(…, response="gradient")',
                    ),
                ),
                "params",
            )


@final
@dataclass(frozen=True)
class CustomUpdate(UpdateRule):
    """A user's ``(init, update)`` pair.

    Raises:
        ArgumentError: when used, if they do not take these arguments, or ``update`` does not return a pair.

    ``init(params) -> opt_state`` and ``update(gradient, opt_state, params, hparams) -> (params,
    opt_state)``, written in operations that the backend differentiates.
    """

    init_fn: Callable[[Tree], Tree]
    update_fn: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]

    def init(self, backend: Backend, params: Tree) -> Tree:
        _check_signature("init(params)", self.init_fn, 1)
        _check_signature("update(gradient, opt_state, params, hparams)", self.update_fn, 4)
        return self.init_fn(params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        pair = self.update_fn(gradient, opt_state, params, hparams)
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ArgumentError(
                f"update returned {type(pair).__name__}: it returns (params, opt_state), the new parameters "
                "and the new state of the optimiser"
            )
        return pair


def _check_signature(form: str, function: Callable[..., Any], count: int) -> None:
    try:
        parameters = signature(function)
    except (TypeError, ValueError):
        return  # a built-in function does not say what it takes
    try:
        parameters.bind(*[None] * count)
    except TypeError as error:
        raise ArgumentError(f"an update pair is called as {form}: {error}") from None


class TorchOptimizer(Protocol):
    """The type of a ``torch.optim`` optimiser, for type checkers."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = ...) -> None: ...


Updates = UpdateRule | TorchOptimizer | tuple[Callable[..., Any], Callable[..., Any]]
"""An update rule of this library, an optimiser of a framework, or a pair ``(init, update)``."""

_OPTIMISERS: dict[str, Callable[[Any], UpdateRule]] = {}


def register_optimiser(name: str, make: Callable[[Any], UpdateRule]) -> None:
    """Let `as_update_rule` accept the optimisers of a framework.

    Args:
        name: the name of their class after that of its package, as in ``"torch.Optimizer"``. It is a string,
            so that the package need not be imported.
        make: an optimiser -> the update rule of its step.
    """
    _OPTIMISERS[name] = make


def _name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def as_update_rule(update: Updates) -> UpdateRule:
    """Return an update rule: the given one, that of a framework's optimiser, or that of a pair of functions.

    Optimisers are converted by the function that their backend registered, an ``(init, update)`` pair
    becomes a `CustomUpdate`.

    Raises:
        ArgumentError: if it is none of these.
    """
    if isinstance(update, UpdateRule):
        return update
    loaded()  # imports the backends of the imported frameworks, which register their optimisers
    for kind in type(update).__mro__:
        if (make := _OPTIMISERS.get(_name(kind))) is not None:
            return make(update)
    if isinstance(update, tuple) and len(update) == 2 and all(callable(part) for part in update):
        return CustomUpdate(*update)
    raise ArgumentError(
        f"{update!r} is not an update rule: pass hg.SGD, hg.Adam, hg.AdamW, hg.RMSprop, hg.Adagrad, an "
        "optimiser of the framework, or a pair (init, update)"
    )
