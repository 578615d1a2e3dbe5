"""The laws that every update rule obeys, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import DisconnectedError
from hypergrad.testing.differences import along, directional, dot, random_like
from hypergrad.testing.problems import close, regression
from hypergrad.updates import UpdateRule, as_update_rule

_WARM = 3
"""Steps before the one that is looked at, so that its state is not that of the start."""


def _warm(backend: Backend, rule: UpdateRule, dtype: Any = float) -> tuple[Tree, Tree, Tree, Tree]:
    """Return gradient, state, parameters and hyperparameters of a step that is not the first."""
    _, params, hparams, _, _ = regression(backend, dtype)
    opt_state = rule.init(backend, params)
    for t in range(_WARM):
        gradient = random_like(backend, params, 10 + t)
        params, opt_state = rule.update(backend, gradient, opt_state, params, hparams, t)
    return random_like(backend, params, 20), opt_state, params, hparams


def updates_keep_the_form(backend: Backend, rule: UpdateRule) -> None:
    """Structure, shapes and dtypes of parameters and state stay as they are, in float32, too."""
    rule = as_update_rule(rule)
    for dtype in ("float64", "float32"):
        _, params, hparams, _, _ = regression(backend, dtype)
        opt_state = rule.init(backend, params)
        gradient = random_like(backend, params, 1)
        new_params, new_state = rule.update(backend, gradient, opt_state, params, hparams, 0)
        assert backend.form(new_params) == backend.form(params)
        assert backend.form(new_state) == backend.form(opt_state)


def updates_are_pure(backend: Backend, rule: UpdateRule) -> None:
    """Arguments do not change, and the same arguments give the same result."""
    rule = as_update_rule(rule)
    given = _warm(backend, rule)
    copies = [backend.to_numpy(leaf).copy() for leaf in backend.flatten(given)[0]]
    first, second = (rule.update(backend, *given, _WARM) for _ in range(2))
    close(backend, first, second, 0.0)
    for leaf, copy in zip(backend.flatten(given)[0], copies, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(leaf), copy)


def updates_depend_on_the_gradient(backend: Backend, rule: UpdateRule) -> None:
    """The graph leads from the new parameters to the gradient: the rule does not cut it off."""
    rule = as_update_rule(rule)
    gradient, opt_state, params, hparams = _warm(backend, rule)
    try:
        rule.check_connected(backend, opt_state, params, hparams, _WARM)
    except DisconnectedError as error:
        raise AssertionError(str(error)) from error

    def moved(gradient: Tree) -> Tree:
        return rule.update(backend, gradient, opt_state, params, hparams, _WARM)[0]

    _, pullback = backend.pullback(moved, gradient)
    assert all(backend.flatten(pullback.reached[0])[0])


def derivatives_of_updates_are_right(backend: Backend, rule: UpdateRule) -> None:
    """The derivative of new parameters and state, by each argument, agrees with central differences."""
    rule = as_update_rule(rule)
    given = _warm(backend, rule)

    def update(*given: Any) -> tuple[Tree, Tree]:
        return rule.update(backend, *given, _WARM)  # type: ignore[call-arg]

    value, pullback = backend.pullback(update, *given)
    weights = random_like(backend, value, 30)
    for k, gradient in enumerate(pullback(weights)):
        # In proportion to each entry, so that a mean of squares stays positive.
        direction = backend.map(lambda x, d: x * d, given[k], random_like(backend, given[k], 40 + k))

        def moved(h: float, k: int = k, direction: Tree = direction) -> float:
            at = [*given[:k], along(backend, given[k], direction, h), *given[k + 1 :]]
            return dot(backend, weights, update(*at))

        np.testing.assert_allclose(
            dot(backend, gradient, direction), directional(moved), rtol=1e-6, atol=1e-8
        )


def steps_may_be_arrays(backend: Backend, rule: UpdateRule) -> None:
    """A step that is an array, as in a compiled loop, gives what a step that is an int gives."""
    rule = as_update_rule(rule)
    given = _warm(backend, rule)
    as_int, as_array = (
        rule.update(backend, *given, step) for step in (_WARM, backend.asarray(np.array(_WARM)))
    )
    close(backend, as_int, as_array, 1e-10)


def states_begin_the_same(backend: Backend, rule: UpdateRule) -> None:
    """``init`` gives the same state each time, and does not change the parameters."""
    rule = as_update_rule(rule)
    params = regression(backend)[1]
    first, second = (rule.init(backend, params) for _ in range(2))
    close(backend, first, second, 0.0)
    close(backend, params, regression(backend)[1], 0.0)


UPDATE_LAWS: tuple[Callable[[Backend, UpdateRule], None], ...] = (
    updates_keep_the_form,
    updates_are_pure,
    updates_depend_on_the_gradient,
    derivatives_of_updates_are_right,
    steps_may_be_arrays,
    states_begin_the_same,
)
