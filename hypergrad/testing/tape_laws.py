"""The laws that every tape obeys, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.backend.turns import same_state
from hypergrad.estimators import Unrolled
from hypergrad.problems.bilevel import Bilevel
from hypergrad.tapes import Full, Tape
from hypergrad.testing.differences import along, directional, dot, random_like
from hypergrad.testing.problems import close, regression, vector
from hypergrad.updates import SGD

_RATE, _MOMENTUM = 0.05, 0.5
_RULE = SGD(_RATE, momentum=_MOMENTUM)
"""A rule with a state, which reversible tapes can run backwards, too."""
_LENGTHS = (1, 2, 3, 6)


def _batches(backend: Backend) -> Callable[[Any], Tree]:
    """Return batches that differ from step to step."""
    train = regression(backend)[3]
    return lambda t: train | {"y": train["y"] * (1.0 + 0.3 * t)}


def _unrolled(
    backend: Backend,
    tape: Tape,
    steps: int,
    truncate: int | None = None,
    problem: Bilevel | None = None,
    train: Callable[[Any], Tree] | None = None,
) -> Any:
    given, params, hparams, _, val = regression(backend)
    estimator, problem = Unrolled(_RULE, steps, truncate, tape=tape), problem or given
    state = estimator.init(problem, params, hparams, backend=backend)
    return estimator.estimate(problem, state, hparams, train or _batches(backend), val, backend=backend)


def _trained(backend: Backend, hparams: Tree, steps: int) -> tuple[Tree, list[float]]:
    """Return the parameters after training with momentum, written out in NumPy, and the losses."""
    problem, params, _, _, _ = regression(backend)
    batches, velocity, losses = _batches(backend), backend.zeros(params), []
    for t in range(steps):
        loss = problem.loss_on(backend, batches(t), None)
        value, pullback = backend.pullback(lambda p, loss=loss: loss(p, hparams)[0], params)
        (gradient,) = pullback(backend.xp.ones_like(value))
        losses.append(float(backend.to_numpy(value)))
        velocity = along(backend, gradient, velocity, _MOMENTUM)
        params = along(backend, params, velocity, -_RATE)
    return params, losses


def hypergradients_are_derivatives_of_the_training(backend: Backend, tape: Tape) -> None:
    """The hypergradient is the derivative of C2 after the training, by differences of the training in NumPy.

    Catches a tape that is one step off, that forgets a step, or that reads the batch of another one.
    """
    problem, _, hparams, _, val = regression(backend)
    direction = random_like(backend, hparams, 7)
    for steps in _LENGTHS:

        def value(h: float, steps: int = steps) -> float:
            lam = along(backend, hparams, direction, h)
            return float(backend.to_numpy(problem.outer(_trained(backend, lam, steps)[0], lam, val)))

        found = dot(backend, _unrolled(backend, tape, steps).hypergradient, direction)
        np.testing.assert_allclose(found, directional(value), rtol=1e-5)


def training_is_unchanged(backend: Backend, tape: Tape) -> None:
    """Parameters after the steps, and the losses of the steps, are those of training without a tape."""
    hparams = regression(backend)[2]
    for steps in _LENGTHS:
        out, (params, losses) = _unrolled(backend, tape, steps), _trained(backend, hparams, steps)
        close(backend, out.state.params, params, 1e-6)
        np.testing.assert_allclose(backend.to_numpy(out.report.inner_values), losses, rtol=1e-6)


def truncated_unrolls_agree(backend: Backend, tape: Tape) -> None:
    """A truncated unroll has the hypergradient that it has with `Full`."""
    for steps, kept in ((3, 1), (6, 2), (6, 5)):
        mine, full = (_unrolled(backend, t, steps, kept) for t in (tape, Full()))
        close(backend, mine.hypergradient, full.hypergradient, 1e-6)


def noise_is_replayed(backend: Backend, tape: Tape) -> None:
    """What a loss draws from the framework's generator is drawn once: as if it had come with the batch."""
    given, _, _, train, _ = regression(backend)
    shape = backend.describe(train["x"]).shape
    with backend.random.replay(before := backend.random.state()):
        _draw(backend, shape)
        if same_state(before, backend.random.state()):
            return  # it has no generator, or one that this law does not know how to draw from

    def noisy(params: Tree, hparams: Tree, batch: Tree) -> Any:
        noise = batch["noise"] if "noise" in batch else _draw(backend, shape)
        moved = batch | {"x": batch["x"] + 0.3 * hparams["tilt"] * noise}
        return given.loss_on(backend, moved, None)(params, hparams)[0]

    problem, steps, batches = Bilevel(noisy, given.outer), 6, _batches(backend)
    with backend.random.replay(backend.random.state(seed=3)):
        held = [_draw(backend, shape) for _ in range(steps)]
    expected = _unrolled(
        backend, Full(), steps, problem=problem, train=lambda t: batches(t) | {"noise": held[t]}
    )
    with backend.random.replay(backend.random.state(seed=3)):
        found = _unrolled(backend, tape, steps, problem=problem)
    close(backend, found.hypergradient, expected.hypergradient, 1e-6)


def _draw(backend: Backend, shape: tuple[int, ...]) -> Any:
    """Draw from the framework's generator, by its own function."""
    draw = getattr(backend.xp, "randn", None)
    return backend.asarray(np.random.normal(size=shape) if draw is None else draw(shape).double())


def records_are_pure(backend: Backend, tape: Tape) -> None:
    """The same unroll twice gives the same hypergradient, bit for bit."""
    first, second = (_unrolled(backend, tape, 6) for _ in range(2))
    close(backend, first.hypergradient, second.hypergradient, 0.0)


def tapes_hold_any_tree(backend: Backend, tape: Tape) -> None:
    """Parameters may be nested, without dimensions, and ``None`` may be among them."""
    xp, start = backend.xp, {"a": [vector(backend, 1, 2), None], "b": vector(backend, 2)}

    def inner(p: Tree, h: Any, batch: Tree) -> Any:
        return 0.5 * xp.sum(h * p["a"][0] ** 2) + 0.5 * (p["b"] - xp.sum(p["a"][0])) ** 2

    problem = Bilevel(inner, lambda p, h, batch: p["b"] ** 2 + xp.sum(p["a"][0]))
    hparams = vector(backend, 3, 2)

    def of(tape: Tape) -> Any:
        estimator = Unrolled(_RULE, 3, tape=tape)
        state = estimator.init(problem, start, hparams, backend=backend)
        return estimator.estimate(problem, state, hparams, lambda t: None, None, backend=backend)

    close(backend, of(tape).hypergradient, of(Full()).hypergradient, 1e-6)


TAPE_LAWS: tuple[Callable[[Backend, Tape], None], ...] = (
    hypergradients_are_derivatives_of_the_training,
    training_is_unchanged,
    truncated_unrolls_agree,
    noise_is_replayed,
    records_are_pure,
    tapes_hold_any_tree,
)
