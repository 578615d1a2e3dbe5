"""T1−T2 online: parameters and hyperparameters trained together."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad import spaces
from hypergrad.arguments import check_variables
from hypergrad.backend import Backend, Scalar, Tree, find_backend, undo_draws
from hypergrad.batches import Batches, one_batch, stream
from hypergrad.checkpoint import read_arrays, write_arrays
from hypergrad.errors import ArgumentError, CheckpointError, NonFiniteError
from hypergrad.estimators import Estimate, HypergradientEstimator, State
from hypergrad.history import History
from hypergrad.problem import Bilevel
from hypergrad.progress import progress as show_progress
from hypergrad.spaces import Real
from hypergrad.training import Inner, Seen, Training
from hypergrad.updates import Adam, UpdateRule, as_update_rule


class TunerState(NamedTuple):
    """Where a run stands: a tree of arrays and counters.

    ``free`` holds the hyperparameters in the free coordinates of their spaces; `Tuner.hparams` gives
    them in their own domain. ``since`` counts training steps since their last update, ``updates`` the
    updates. ``start`` is θ_0 if the tuner restarts from it.
    """

    inner: State
    free: Tree
    hyper_state: Tree
    since: Any
    updates: Any
    start: Tree


class Step(NamedTuple):
    """What one call of `Tuner.step` did.

    ``trained`` counts its training steps; ``estimate`` is ``None`` if it only trained; ``clipped`` counts
    the entries that were moved back into their space.
    """

    inner_value: Scalar
    trained: int
    estimate: Estimate | None
    clipped: Any


class Run(NamedTuple):
    """The outcome of `Tuner.run`."""

    params: Tree
    hparams: Tree
    state: TunerState
    history: History


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

    problem: Bilevel
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

        if not self._trains and self.restart:
            raise ArgumentError(f"Tuner: restart=True begins an unroll again, and {name} unrolls nothing")

    @property
    def _trains(self) -> bool:
        return self.estimator.training_steps > 0

    @property
    def _rule(self) -> UpdateRule:
        return as_update_rule(getattr(self.estimator, "update", None) if self._trains else self.update)

    def init(self, params: Tree, hparams: Tree, *, backend: Backend | str | None = None) -> TunerState:
        """The state before the first step.

        Raises:
            ArgumentError: if a hyperparameter lies outside of its space, and as for any estimate.
        """
        found = find_backend(params, hparams, backend=backend)
        check_variables(found, params=params, hparams=hparams)
        params, hparams = found.adopt((params, hparams))
        inner = self.estimator.init(self.problem, params, hparams, backend=found)
        if not self._trains:
            inner = inner._replace(opt_state=self._rule.init(found, params))
        free = spaces.unconstrain(found, spaces.spread(found, self.space, hparams), hparams)
        hyper_state = as_update_rule(self.hyper_update).init(found, free)
        return TunerState(inner, free, hyper_state, 0, 0, params if self.restart else ())

    def hparams(self, state: TunerState, *, backend: Backend | str | None = None) -> Tree:
        """The hyperparameters of a state, in their own domain."""
        found = find_backend(state.free, backend=backend)
        return spaces.constrain(found, spaces.spread(found, self.space, state.free), state.free)

    def step(
        self, state: TunerState, train: Batches, val: Batches, *, backend: Backend | str | None = None
    ) -> tuple[TunerState, Step]:
        """One training step, or an estimate with all of its training steps and an update of λ.

        Args:
            state: from `init` or the last step.
            train: batches of T1; see `hypergrad.batches`. A function is called with the training step.
            val: a batch of T2, or a function called with the number of updates so far.
            backend: found from the arrays if it is not given.

        Raises:
            As `HypergradientEstimator.estimate`; the state given is then still good.
        """
        found = find_backend(state.inner.params, state.free, backend=backend)
        with undo_draws(found):
            return self._step(found, found.adopt(state), train, val)

    def _step(
        self, backend: Backend, state: TunerState, train: Batches, val: Batches
    ) -> tuple[TunerState, Step]:
        steps = self.estimator.training_steps
        period = max(self.every, steps)
        if steps and state.since >= period - steps:
            return self._tune(backend, state, train, val, trained=steps)
        batch = one_batch("train", train, state.inner.step)
        state, seen = self._train(backend, state, batch)
        if not steps and state.since >= period:
            state, done = self._tune(backend, state, lambda t: batch, val, trained=1)
            return state, done._replace(inner_value=seen.inner_value)
        return state, Step(seen.inner_value, 1, None, 0)

    def _train(self, backend: Backend, state: TunerState, batch: Tree) -> tuple[TunerState, Seen]:
        phi = Training(backend, self.problem, self._rule)
        params, opt_state, step, memory = state.inner
        lam = self.hparams(state, backend=backend)
        (params, opt_state), seen = phi.step(Inner(params, opt_state), lam, batch, step)
        if backend.readable(seen.bad_step) and int(seen.bad_step) >= 0:
            leaf = int(seen.bad_leaf)
            path = None if leaf < 0 else backend.paths(params, "params")[leaf]
            raise NonFiniteError("T1", int(seen.bad_step), path)
        inner = State(params, opt_state, step + 1, memory)
        return state._replace(inner=inner, since=state.since + 1), seen

    def _tune(
        self, backend: Backend, state: TunerState, train: Batches, val: Batches, trained: int
    ) -> tuple[TunerState, Step]:
        tree_of_spaces = spaces.spread(backend, self.space, state.free)
        lam = spaces.constrain(backend, tree_of_spaces, state.free)
        inner = state.inner
        if self.restart:
            inner = self.estimator.init(self.problem, state.start, lam, backend=backend)
        batch = one_batch("val", val, state.updates)
        out = self.estimator.estimate(self.problem, inner, lam, train, lambda _: batch, backend=backend)
        slope = spaces.chain(backend, tree_of_spaces, state.free, out.hypergradient)
        moved, hyper_state = as_update_rule(self.hyper_update).update(
            backend, slope, state.hyper_state, state.free, (), state.updates
        )
        free, clipped = spaces.project(backend, tree_of_spaces, moved)
        new = TunerState(out.state, free, hyper_state, 0, state.updates + 1, state.start)
        return new, Step(out.inner_value, trained, out, clipped)

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
        backend: Backend | str | None = None,
    ) -> Run:
        """Train until ``steps`` training steps are done, and keep a history.

        Args:
            params: θ_0.
            hparams: λ_0, in its own domain.
            train: batches of T1. A list starts again at its end; a function is called with the step.
            val: batches of T2, in turn, one for each update of λ.
            steps: training steps in all, those of a resumed run included.
            seed: makes the framework's own generator start from here, and puts it back afterwards.
            progress: show a bar; by default on a terminal.
            resume: state and history of an earlier run, as `load` returns them.
            backend: found from the arrays if it is not given.

        Raises:
            As `HypergradientEstimator.estimate`; ArgumentError if T1 or T2 runs out, and says which.
        """
        found = find_backend(params, hparams, backend=backend)
        train, val = stream(found, "train", train), stream(found, "val", val)
        if resume is None:
            state, history = self.init(params, hparams, backend=found), History()
            history.record(found, 0, hparams, None, 0, 0.0)
        else:
            state, history = resume
        spent, done = history.cost[-1], len(history.inner_values)
        unlogged = done - history.steps[-1]
        seeded = nullcontext() if seed is None else found.replay(found.generator(seed))
        with undo_draws(found), seeded, show_progress("training", steps, progress) as advance:
            advance(done, "")
            while done < steps:
                state, now = self.step(state, train, val, backend=found)
                done += now.trained
                history.inner_values += [float(now.inner_value)] * now.trained
                note = ""
                if now.estimate is None:
                    unlogged += 1
                else:
                    plain = unlogged if self._trains else unlogged + 1
                    spent += plain + float(now.estimate.report.cost)
                    unlogged = 0
                    lam = self.hparams(state, backend=found)
                    history.record(found, done, lam, now.estimate, int(now.clipped), spent)
                    note = f"T1 {history.inner_values[-1]:.3f}  T2 {history.outer_values[-1]:.3f}"
                advance(now.trained, note)
        return Run(state.inner.params, self.hparams(state, backend=found), state, history)

    def save(
        self, path: str | Path, run: Run | tuple[TunerState, History], *, backend: Backend | str | None = None
    ) -> None:
        """Write state and history to one ``.npz`` file, whole or not at all.

        The framework's generator is not part of it: a run resumes bit for bit where its noise comes with
        the batches, as functions of the step.

        Raises:
            OSError: if the file cannot be written; an older one is then left as it was.
        """
        state, history = run[-2:]
        found = find_backend(state.free, backend=backend)
        leaves = zip(found.paths(state, "state"), found.flatten(state)[0], strict=True)
        arrays = {f"state:{name}": found.to_numpy(leaf) for name, leaf in leaves}
        about = {"backend": np.array(found.name), "tuner": np.array(repr(self.estimator))}
        write_arrays(path, arrays | about | {f"history:{k}": v for k, v in history.arrays().items()})

    def load(
        self, path: str | Path, params: Tree, hparams: Tree, *, backend: Backend | str | None = None
    ) -> tuple[TunerState, History]:
        """Read what `save` wrote, for ``run(..., resume=...)``; params and hparams give the structure.

        Raises:
            CheckpointError: if the file is damaged, or was written for another backend or structure.
            FileNotFoundError: if there is none.
        """
        found = find_backend(params, hparams, backend=backend)
        model = self.init(params, hparams, backend=found)
        stored = read_arrays(path)
        if (name := str(stored.get("backend", "?"))) != found.name:
            raise CheckpointError(f"{path} was written by backend {name!r}, and this is {found.name!r}")
        leaves, unflatten = found.flatten(model)
        wanted = [f"state:{name}" for name in found.paths(model, "state")]
        held = {key for key in stored if key.startswith("state:")}
        if differences := sorted(held ^ set(wanted)):
            raise CheckpointError(f"{path} has another structure; it differs in {', '.join(differences)}")
        for key, leaf in zip(wanted, leaves, strict=True):
            if np.shape(stored[key]) != np.shape(found.to_numpy(leaf)):
                raise CheckpointError(f"{path}: {key} has shape {stored[key].shape}")
            if not np.issubdtype(stored[key].dtype, np.integer if isinstance(leaf, int) else np.floating):
                raise CheckpointError(f"{path}: {key} holds {stored[key].dtype}")
        state = unflatten(
            [
                int(stored[key]) if isinstance(leaf, int) else found.asarray(stored[key], like=leaf)
                for key, leaf in zip(wanted, leaves, strict=True)
            ]
        )
        history = {key[8:]: value for key, value in stored.items() if key.startswith("history:")}
        return state, History.from_arrays(history)
