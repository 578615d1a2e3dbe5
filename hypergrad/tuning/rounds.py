"""The parts of an online run: training steps, updates of λ, and rounds of both.

A *program* is a pure function of arrays, which a backend may compile; it is made from what it knows of the
tuner and of the batches. Around programs stand functions that read batches and look for faults: they run as
they are, or inside of a larger program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.backend.loops import Loops
from hypergrad.errors import ArgumentError
from hypergrad.estimators import Estimate, State
from hypergrad.estimators.base import inner_state, state_after
from hypergrad.problems.batches import Batches, Source, one_batch, single, stream, window
from hypergrad.problems.step import Inner, Seen, Training
from hypergrad.tuning import spaces
from hypergrad.tuning.history import History, Row, namespace
from hypergrad.tuning.progress import Advance, silent
from hypergrad.updates import as_update_rule

if TYPE_CHECKING:
    from hypergrad.tuning.tuner import Tuner

Program = Callable[..., Any]
"""A pure function of arrays."""

Make = Callable[..., Program]
"""(backend, f, *given) -> f(tuner, backend, *given, …), as a program of its own or as a part of one."""


class TunerState(NamedTuple):
    """Where a run stands: a tree of arrays and counters.

    ``free`` holds the hyperparameters in the free coordinates of their spaces; `Tuner.hparams` gives
    them in their own domain. ``since`` counts training steps since their last update, ``updates`` the
    updates. ``start`` is the inner state from which the tuner restarts, if it does.
    """

    inner: State
    free: Tree
    hyper_state: Tree
    since: Any
    updates: Any
    start: Tree


class Step(NamedTuple):
    """What `Tuner.step` did.

    ``seen`` is what was seen in plain training, with the T1 loss; ``trained`` counts the training steps. If
    λ was ``updated``, ``estimate`` is what moved it, and ``clipped`` counts the entries that were moved back
    into their space; if not, ``estimate`` is ``None``, or without a meaning where a compiler made it.
    """

    seen: Seen
    trained: Any
    updated: Any
    estimate: Estimate | None
    clipped: Any

    @property
    def inner_value(self) -> Scalar:
        """C̃1 at the last training step."""
        return self.seen.inner_value


class Outcome(NamedTuple):
    """What a program of rounds kept: their rows and T1 losses, the losses after them, and the last step."""

    rows: tuple[Row, Tree, Any] | None
    tail: Tree
    last: Step

    def add_to(self, backend: Backend, history: History, plain: int, closing: int) -> History:
        """The history with these rounds, of so many plain steps and so many that came with the update."""
        if self.rows is not None:
            rows, values, value = backend.collect(self.rows)
            count, done = len(value), len(history.inner_values)
            steps = done + (plain + closing) * np.arange(1, count + 1)
            losses = namespace(value).broadcast_to(value[:, None], (count, closing))
            if plain:
                losses = namespace(value).concatenate([values, losses], 1)
            history = history.then(rows, steps).trained(losses.reshape(-1))
        return history if isinstance(self.tail, tuple) else history.trained(backend.collect(self.tail))


# Programs.


def training(
    tuner: Tuner, backend: Backend, z: Inner, hparams: Tree, batch: Tree, t: Any
) -> tuple[Inner, Seen]:
    """One step of plain training."""
    return Training(backend, tuner.problem, tuner.rule).step(z, hparams, batch, t)


def updating(
    tuner: Tuner, backend: Backend, read: Callable[..., Tree], state: TunerState, data: Tree, val: Tree
) -> tuple[TunerState, Step]:
    """An estimate with its training steps, and an update of λ, which a fault leaves where it is."""
    train: Batches = Source(data, read)
    lam, inner = tuner.hparams(state, backend=backend), state.inner
    if tuner.restart:
        start = state.start
        fresh = tuner.estimator.init(tuner.problem, start.params, lam, aux=start.aux, backend=backend)
        inner = tuner.estimator.restarted(fresh, inner)
    seen = None
    if not tuner.estimator.training_steps:
        batch = train(inner.step)
        z, seen = training(tuner, backend, inner_state(inner), lam, batch, inner.step)
        inner = state_after(inner, z, inner.step + 1)
        if not tuner.estimator.resamples:
            train = single(batch)
    out = tuner.estimator.estimate(tuner.problem, inner, lam, train, lambda _: val, backend=backend)
    if seen is None:
        seen = Seen(out.inner_value, out.report.inner_gradient_norm)

    tree_of_spaces = spaces.spread(backend, tuner.space, state.free)
    slope = spaces.chain(backend, tree_of_spaces, state.free, out.hypergradient)
    before = state.free, state.hyper_state
    moved, hyper_state = as_update_rule(tuner.hyper_update).update(
        backend, slope, state.hyper_state, state.free, (), state.updates
    )
    free, clipped = spaces.project(backend, tree_of_spaces, moved)
    fine = _fine(tuner, backend, out, seen)
    if fine is not True:
        free, hyper_state = backend.map(
            lambda new, old: backend.xp.where(fine, new, old), (free, hyper_state), before
        )
    new = state._replace(inner=out.state, free=free, hyper_state=hyper_state)
    return new, Step(seen, 1, True, _bare(out), clipped)


def running(
    tuner: Tuner,
    backend: Backend,
    plain: int,
    rounds: int,
    tail: int,
    hosted: bool,
    advance: Advance,
    read_train: Callable[..., Tree],
    read_val: Callable[..., Tree],
    state: TunerState,
    train_data: Tree,
    val_data: Tree,
) -> tuple[TunerState, Outcome]:
    """Rounds of plain steps and one update of λ, and some plain steps after them.

    A ``hosted`` one runs in Python, because its batches do, and only its steps are compiled.
    """
    train, val = Source(train_data, read_train), Source(val_data, read_val)
    loops: Loops = Loops(backend) if hosted else backend.loops
    make = tuner.compiled if hosted else tuner.made

    def show(count: int, *losses: Scalar) -> None:
        if advance is not silent:
            loops.callback(partial(_show, advance, count), *losses)

    def train_for(state: TunerState, count: int) -> tuple[TunerState, Seen, Tree]:
        def body(carry: tuple[TunerState, Seen], k: Any, _: Any) -> tuple[tuple[TunerState, Seen], Scalar]:
            state, seen = carry
            state, done = train_once(tuner, make, backend, state, train)
            show(1)
            return (state, seen.then(backend, done.seen)), done.inner_value

        nothing = Seen.nothing(backend, state.inner.params)
        if count == 0:
            return state, nothing, ()
        (state, seen), values = loops.scan(body, (state, nothing), count)
        return state, seen, backend.collect(values)

    def one_round(state: TunerState, k: Any) -> tuple[TunerState, Tree, Step, Any]:
        state, before, values = train_for(state, plain)
        state, done = update_once(tuner, make, backend, state, train, val)
        out = done.estimate
        assert out is not None
        show(tuner.closing_steps, done.inner_value, out.outer_value)
        spent = out.report.cost + tuner.plain_steps + (0 if tuner.estimator.training_steps else 1)
        row = Row.of(backend, tuner.hparams(state, backend=backend), out, done.clipped, spent)
        done = done._replace(seen=before.then(backend, done.seen), estimate=_bare(out))
        return state, (row, values, done.inner_value), done, _fine(tuner, backend, out, done.seen)

    rows, last, fine = None, Step(Seen.nothing(backend, state.inner.params), tail, False, None, 0), True
    if rounds:
        state, rows, last, _ = loops.repeat(one_round, state, rounds)
        rows = backend.collect(rows)
        fine = _fine(tuner, backend, last.estimate, last.seen)
    state, seen, values = train_for(state, tail)
    if tail:
        # After a fault the steps of the tail mean nothing.
        later = seen._replace(bad_step=backend.xp.where(fine, seen.bad_step, -1))
        last = last._replace(seen=last.seen.then(backend, later))
    return state, Outcome(rows, values, last)


# What reads batches, runs a program and looks for faults.


def train_once(
    tuner: Tuner, make: Make, backend: Backend, state: TunerState, train: Batches
) -> tuple[TunerState, Step]:
    """One training step; T2 is not touched."""
    batch, lam = one_batch("train", train, state.inner.step), tuner.hparams(state, backend=backend)
    z, seen = make(backend, training)(inner_state(state.inner), lam, batch, state.inner.step)
    inner = state_after(state.inner, z, state.inner.step + 1)
    new = state._replace(inner=inner, since=state.since + 1)
    return _checked(tuner, backend, new, Step(seen, 1, False, None, 0))


def update_once(
    tuner: Tuner, make: Make, backend: Backend, state: TunerState, train: Batches, val: Batches
) -> tuple[TunerState, Step]:
    """An estimate with its training steps, and an update of λ."""
    start, count = (state.start if tuner.restart else state.inner).step, tuner.closing_steps
    given = train
    if callable(train) and backend.compiles and make == tuner.compiled:
        # A program is known by the functions in it, and this one may be new in every step: call it here.
        train = [train(start + k) for k in range(count)]
    if tuner.estimator.resamples:
        # The estimate takes batches beyond its own.
        data, read = stream(backend, "train", given)
    elif count == 1:
        data, read = single(one_batch("train", train, start))
    else:
        data, read = window(backend, "train", train, start, count)
    batch = one_batch("val", val, state.updates)
    new, done = make(backend, updating, read)(state._replace(since=0), data, batch)
    # The counters are known without waiting for the program.
    new = new._replace(inner=new.inner._replace(step=start + count), since=0, updates=state.updates + 1)
    return _checked(tuner, backend, new, done._replace(trained=count, updated=True))


def either_once(
    tuner: Tuner, backend: Backend, state: TunerState, train: Batches, val: Batches
) -> tuple[TunerState, Step]:
    """A step of whichever kind the state asks for, where that is known only as it runs."""
    if isinstance(train, Iterator) or isinstance(val, Iterator):
        raise ArgumentError(
            "Tuner.step: a program that is compiled once cannot take batch after batch from an iterator: "
            "take them outside of it, and pass each as an argument"
        )

    def update() -> tuple[TunerState, Step]:
        new, done = update_once(tuner, tuner.made, backend, state, train, val)
        assert done.estimate is not None
        return new, done._replace(estimate=_bare(done.estimate))

    new, done = backend.cond(
        state.since >= tuner.plain_steps,
        update,
        lambda: train_once(tuner, tuner.made, backend, state, train),
    )
    return new, whole(new, done)


def _checked(tuner: Tuner, backend: Backend, state: TunerState, done: Step) -> tuple[TunerState, Step]:
    """Raise what can be read of a step's faults."""
    done = whole(state, done)
    if backend.readable(done.inner_value):
        # Where nothing compiles the estimate has been checked as it was made, warnings and all.
        fresh = done if backend.compiles else done._replace(updated=False)
        tuner.check(state, fresh, backend=backend)
    return state, done


def _fine(tuner: Tuner, backend: Backend, out: Estimate, seen: Seen) -> Any:
    """Is there no fault? Where values can be read it has been raised by now."""
    if backend.readable(out.outer_value):
        return True
    return tuner.estimator.sound(out, backend=backend) & (seen.bad_step < 0)


def _bare(out: Estimate) -> Estimate:
    """An estimate without its state, which the tuner's state holds already."""
    return out._replace(state=State(()))


def whole(state: TunerState, done: Step) -> Step:
    """A step whose estimate has its state again."""
    if done.estimate is None:
        return done
    return done._replace(estimate=done.estimate._replace(state=state.inner))


def _show(advance: Advance, count: int, *losses: Scalar) -> None:
    advance(count, "  ".join(f"{name} {float(x):.3f}" for name, x in zip(("T1", "T2"), losses, strict=False)))
