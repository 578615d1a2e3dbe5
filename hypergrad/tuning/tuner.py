"""T1−T2 online: parameters and hyperparameters trained together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Tree, find_backend
from hypergrad.backend.arguments import check_variables
from hypergrad.errors import ArgumentError, CheckpointError, NonFiniteError
from hypergrad.estimators import HypergradientEstimator
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches, stream
from hypergrad.problems.step import Seen
from hypergrad.tuning import spaces
from hypergrad.tuning.checkpoint import read_arrays, restore_tree, tree_arrays, write_arrays
from hypergrad.tuning.history import History
from hypergrad.tuning.progress import progress as show_progress
from hypergrad.tuning.rounds import (
    Program,
    Step,
    TunerState,
    either_once,
    running,
    train_once,
    update_once,
    whole,
)
from hypergrad.tuning.spaces import Real
from hypergrad.updates import Adam, UpdateRule, as_update_rule


class Run(NamedTuple):
    """The outcome of `Tuner.run`; ``last`` is its last round, whose faults `Tuner.check` raises."""

    params: Tree
    hparams: Tree
    state: TunerState
    history: History
    last: Step | None


@final
@dataclass(frozen=True)
class Tuner:
    r"""Train θ and λ in one run: λ moves once in every ``every`` training steps (Luketina et al. 2016).

        θ ← Φ(θ, λ, T1 batch)            every step; no validation pass
        u ← u − hyper_update(dC2/du)     every ``every`` steps, with dC2/du chained from dC2/dλ

    The estimator's own training steps are among the ``every``: `Greedy` trains the last of them,
    `Unrolled(steps=T)` the last T, or T for each update if T is larger, and goes on from where its last
    unroll ended. `Implicit` trains none, so ``update`` does.

    Args:
        problem: the two losses.
        estimator: any `HypergradientEstimator`.
        space: a `hypergrad.spaces.Space`, or a tree of them as the hyperparameters'.
        hyper_update: the update rule of λ, in free coordinates; its rates are numbers.
        every: training steps for each update of λ.
        update: trains θ where the estimator has no update rule of its own.
        restart: begin every unroll at θ_0 again, so that λ is tuned for a training run of that length.

    Raises:
        ArgumentError: if ``every`` is no positive integer, if an update rule for θ is missing or given
            twice, or if ``restart`` is asked of an estimator that does not train.
    """

    problem: Problem
    estimator: HypergradientEstimator
    space: Any = field(default_factory=Real)
    hyper_update: Any = field(default_factory=lambda: Adam(1e-2))
    every: int = 10
    update: Any = None
    restart: bool = False

    def __post_init__(self) -> None:
        as_update_rule(self.hyper_update)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ArgumentError(f"Tuner: every = {self.every!r}; it is a positive integer")
        name = type(self.estimator).__name__
        if self._trains and self.update is not None:
            raise ArgumentError(f"Tuner: {name} trains θ by its own update rule; leave update= out")
        if not self._trains and self.update is None:
            raise ArgumentError(f"Tuner: {name} does not train θ; pass update=, such as hg.Adam(1e-3)")

        if self.estimator.needs_every_step and self.plain_steps:
            raise ArgumentError(
                f"Tuner: {name} carries its tangents through every step, and {self.plain_steps} of every = "
                f"{self.every} would be without: take steps={self.every}"
            )
        if not self.problem.definite:
            raise ArgumentError("Tuner: a level above another is a saddle, to which no training leads")
        if not self._trains and self.restart:
            raise ArgumentError(f"Tuner: restart=True begins an unroll again, and {name} unrolls nothing")

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone, without the programs made of them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def _trains(self) -> bool:
        return self.estimator.training_steps > 0

    @property
    def rule(self) -> UpdateRule:
        return as_update_rule(getattr(self.estimator, "update", None) if self._trains else self.update)

    @property
    def closing_steps(self) -> int:
        """Training steps that come with an update of λ."""
        return max(1, self.estimator.training_steps)

    @property
    def plain_steps(self) -> int:
        """Training steps before it."""
        return max(self.every, self.closing_steps) - self.closing_steps

    def init(
        self, params: Tree, hparams: Tree, *, aux: Tree = None, backend: Backend | str | None = None
    ) -> TunerState:
        """The state before the first step; ``aux`` is the auxiliary state of losses that have one.

        Raises:
            ArgumentError: if a hyperparameter lies outside of its space, and as for any estimate.
        """
        found = find_backend(params, hparams, backend=backend)
        check_variables(found, params=params, hparams=hparams)
        params, hparams = found.constants((params, hparams))
        inner = self.estimator.init(self.problem, params, hparams, aux=aux, backend=found)
        if not self._trains:
            inner = inner._replace(opt_state=self.rule.init(found, params))
        free = spaces.unconstrain(found, spaces.spread(found, self.space, hparams), hparams)
        hyper_state = as_update_rule(self.hyper_update).init(found, free)
        return TunerState(inner, free, hyper_state, 0, 0, inner if self.restart else ())

    def hparams(self, state: TunerState, *, backend: Backend | str | None = None) -> Tree:
        """The hyperparameters of a state, in their own domain."""
        found = find_backend(state.free, backend=backend)
        return spaces.constrain(found, spaces.spread(found, self.space, state.free), state.free)

    def step(
        self, state: TunerState, train: Batches, val: Batches, *, backend: Backend | str | None = None
    ) -> tuple[TunerState, Step]:
        """One training step, or an estimate with all of its training steps and an update of λ.

        In JAX a step is compiled, once where it only trains and once where λ moves. It may also be part of
        a program of yours, ``jax.jit(tuner.step)``, which then holds both; what it cannot raise there,
        `check` raises outside, and λ does not move on a fault.

        Args:
            state: from `init` or the last step.
            train: batches of T1; see `hypergrad.batches`. A function is called with the training step.
            val: a batch of T2, or a function called with the number of updates so far.
            backend: found from the arrays if it is not given.

        Raises:
            As `HypergradientEstimator.estimate`; the state given is then still good.
        """
        found = find_backend(state.inner.params, state.free, backend=backend)
        with found.random.undone_on_failure():
            state = found.constants(state)
            if not found.readable(state.since):
                return either_once(self, found, state, train, val)
            if int(state.since) >= self.plain_steps:
                return update_once(self, self.compiled, found, state, train, val)
            return train_once(self, self.compiled, found, state, train)

    def check(self, state: TunerState, done: Step, *, backend: Backend | str | None = None) -> None:
        """Raise what a step has to report, or the last one of a run: ``check(run.state, run.last)``.

        Raises:
            As `HypergradientEstimator.check`.
        """
        found = find_backend(state.inner.params, state.free, backend=backend)
        if (step := int(done.seen.bad_step)) >= 0:
            leaf = int(done.seen.bad_leaf)
            path = None if leaf < 0 else found.paths(state.inner.params, "params")[leaf]
            raise NonFiniteError("T1", step, path)
        if done.estimate is not None and bool(done.updated):
            self.estimator.check(done.estimate, backend=found)

    @cached_property
    def _programs(self) -> Callable[..., Program]:
        """Compiled programs, by what they were made of; those of older batch functions are forgotten."""
        return lru_cache(maxsize=8)(lambda backend, *made: backend.compile(self.made(backend, *made)))

    def compiled(self, backend: Backend, f: Callable[..., Any], *given: Any) -> Program:
        """One of `hypergrad.rounds` as a program of its own, compiled once."""
        return (self._programs if backend.compiles else self.made)(backend, f, *given)

    def made(self, backend: Backend, f: Callable[..., Any], *given: Any) -> Program:
        """The same as a part of a larger program."""
        return partial(f, self, backend, *given)

    def run(
        self,
        params: Tree,
        hparams: Tree,
        train: Batches,
        val: Batches,
        steps: int,
        *,
        seed: int | None = None,
        progress: bool | None = None,
        resume: tuple[TunerState, History] | None = None,
        aux: Tree = None,
        backend: Backend | str | None = None,
    ) -> Run:
        """Train until ``steps`` training steps are done, and keep a history.

        In JAX the whole run is one compiled program, which stops at its first fault; batches are then
        functions of a traced step, or lists. From iterators it goes step by step, with both kinds of steps
        compiled. Under ``jax.vmap`` over starts each has its own history and its own ``last``.

        Args:
            params: θ_0.
            hparams: λ_0, in its own domain.
            train: batches of T1. A list starts again at its end; a function is called with the step.
            val: batches of T2, in turn, one for each update of λ.
            steps: training steps in all, those of a resumed run included.
            seed: makes the framework's own generator start from here, and puts it back afterwards.
            progress: show a bar; by default on a terminal.
            resume: state and history of an earlier run, as `load` returns them.
            aux: the auxiliary state with which losses that have one begin.
            backend: found from the arrays if it is not given.

        Raises:
            As `HypergradientEstimator.estimate`; ArgumentError if T1 or T2 runs out, and says which.
        """
        found = find_backend(params, hparams, backend=backend)
        if resume is None:
            state, history = self.init(params, hparams, aux=aux, backend=found), History.start(found, hparams)
        else:
            state, history = resume
        # Only what reads no iterator can become one program.
        hosted = isinstance(train, Iterator) or isinstance(val, Iterator)
        make = self.made if hosted else self.compiled
        (train_data, read_train), (val_data, read_val) = (
            stream(found, "train", train),
            stream(found, "val", val),
        )
        seeded = nullcontext() if seed is None else found.random.replay(found.random.state(seed))
        done, last = (
            len(history.inner_values),
            Step(Seen.nothing(found, state.inner.params), 0, False, None, 0),
        )
        with found.random.undone_on_failure(), seeded, show_progress("training", steps, progress) as advance:
            advance(done, "")
            for plain, rounds, tail in self._plan(int(state.since), steps - done):
                since = 0 if rounds else int(state.since)
                program = make(found, running, plain, rounds, tail, hosted, advance, read_train, read_val)
                state, outcome = program(state._replace(since=0), train_data, val_data)
                state = state._replace(since=since + tail)
                last = whole(state, outcome.last)
                history = outcome.add_to(found, history, plain, self.closing_steps)
                if isinstance(history.cost, np.ndarray):  # otherwise a compiler is tracing
                    self.check(state, last, backend=found)
        return Run(state.inner.params, self.hparams(state, backend=found), state, history, last)

    def _plan(self, since: int, steps: int) -> list[tuple[int, int, int]]:
        """How often to go round: plain steps of each, rounds, and plain steps after them.

        A round that a resumed run is in is a part of its own. An unroll that is begun is finished, even if
        that is some steps more.
        """
        parts, left = [], max(self.plain_steps - since, 0)
        if since and steps > left:
            parts.append((left, 1, 0))
            steps, since = steps - left - self.closing_steps, 0
        if since:
            return [(0, 0, steps)] if steps > 0 else []
        rounds, tail = divmod(max(steps, 0), self.plain_steps + self.closing_steps)
        if tail > self.plain_steps:
            rounds, tail = rounds + 1, 0
        return parts + ([(self.plain_steps, rounds, tail)] if rounds or tail else [])

    def save(
        self, path: str | Path, run: Run | tuple[TunerState, History], *, backend: Backend | str | None = None
    ) -> None:
        """Write state and history to one ``.npz`` file, whole or not at all.

        The framework's generator is not part of it: a run resumes bit for bit where its noise comes with
        the batches, as functions of the step.

        Raises:
            OSError: if the file cannot be written; an older one is then left as it was.
        """
        state, history = run[2:4] if isinstance(run, Run) else run
        found = find_backend(state.free, backend=backend)
        about = {"backend": np.array(found.name), "tuner": np.array(repr(self.estimator))}
        columns = {f"history:{name}": column for name, column in history.arrays().items()}
        write_arrays(path, tree_arrays(found, "state", state) | about | columns)

    def load(
        self,
        path: str | Path,
        params: Tree,
        hparams: Tree,
        *,
        aux: Tree = None,
        backend: Backend | str | None = None,
    ) -> tuple[TunerState, History]:
        """Read what `save` wrote, for ``run(..., resume=...)``; params, hparams and aux give the structure.

        Raises:
            CheckpointError: if the file is damaged, or was written for another backend or structure.
            FileNotFoundError: if there is none.
        """
        found = find_backend(params, hparams, backend=backend)
        model = self.init(params, hparams, aux=aux, backend=found)
        stored = read_arrays(path)
        if (name := str(stored.get("backend", "?"))) != found.name:
            raise CheckpointError(f"{path} was written by backend {name!r}, and this is {found.name!r}")
        state = restore_tree(found, "state", model, stored, path)
        history = {key[8:]: value for key, value in stored.items() if key.startswith("history:")}
        return state, History.from_arrays(history)
