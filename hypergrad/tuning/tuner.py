"""T1−T2 online: parameters and hyperparameters trained together, as a pure function of a state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, final

from hypergrad.backend import Backend, Tree, find_backend
from hypergrad.backend.arguments import check_variables
from hypergrad.errors import each_warning_once
from hypergrad.estimators import HypergradientEstimator
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches
from hypergrad.tuning import folder
from hypergrad.tuning.files import opened, read_arrays, sealed, write_arrays
from hypergrad.tuning.history import History
from hypergrad.tuning.interrupts import Ended, Interrupts
from hypergrad.tuning.programs import Programs
from hypergrad.tuning.progress import progress as show_progress
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.recorder import Recorder
from hypergrad.tuning.running import Running
from hypergrad.tuning.saved import Expected, Saved, parts, written
from hypergrad.tuning.spaces import Real, Spaces
from hypergrad.tuning.state import Run, Step, TunerState
from hypergrad.tuning.steps import Steps
from hypergrad.updates import Adam, Updates


@final
@dataclass(frozen=True)
class Tuner:
    r"""Train θ and λ in one run: λ is updated once in every ``every`` steps (Luketina et al. 2016).

        θ ← Φ(θ, λ, T1 batch)            every step; no validation pass
        u ← u − hyper_update(dC2/du)     once in every ``every`` steps, dC2/du = (∂λ/∂u)ᵀ dC2/dλ

    The estimator's own training steps are among the ``every``: `Greedy` takes the last of them,
    `Unrolled(steps=T)` the last T, or T for each update if T is larger. The next step continues from where
    the estimate ended. `Implicit` takes none, so ``update`` takes them all.

    A tuner is immutable: it takes a `TunerState` and returns the next one. To tune an ``nn.Module`` of
    PyTorch in place, in a loop with its own optimiser, see ``hypergrad_torch.ModuleTuner``. Its additional
    arguments have equivalents here: for ``max_norm``, put `ClipNorm` around the update rule; for
    micro-batches, let the loss take the mean over them.

    Args:
        problem: the two losses.
        estimator: any `HypergradientEstimator`.
        space: a space such as `hypergrad.Positive`, or a tree of them with the structure of λ.
        hyper_update: the update rule of λ, in free coordinates; its rates are numbers.
        every: training steps for each update of λ.
        update: trains θ where the estimator has no update rule of its own.
        restart: begin every unroll at θ_0 again, so that λ is tuned for a training run of that length.

    Raises:
        ArgumentError: if ``every`` is not a positive integer, if an update rule for θ is missing or given
            twice, or if the estimator does not train and ``restart`` is true.
    """

    problem: Problem
    estimator: HypergradientEstimator
    space: Spaces = field(default_factory=Real)
    hyper_update: Updates = field(default_factory=lambda: Adam(1e-2))
    every: int = 10
    update: Updates | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        _ = self.recipe  # checks the fields

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone, without the programs compiled from them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def recipe(self) -> Recipe:
        """What is tuned and how, apart from where the state is kept."""
        return Recipe(**{f.name: getattr(self, f.name) for f in fields(self)})

    @cached_property
    def _programs(self) -> Programs:
        return Programs(self.recipe)

    def init(
        self, params: Tree, hparams: Tree, *, aux: Tree = None, backend: Backend | str | None = None
    ) -> TunerState:
        """Return the state before the first step; ``aux`` is the auxiliary state of losses that have one.

        Raises:
            ArgumentError: if a hyperparameter lies outside its space, and as for any estimate.
        """
        backend = find_backend(params, hparams, backend=backend)
        check_variables(backend, params=params, hparams=hparams)
        params, hparams = backend.constants((params, hparams))
        return self.recipe.init(backend, params, hparams, aux)

    def hparams(self, state: TunerState, *, backend: Backend | str | None = None) -> Tree:
        """Return the hyperparameters of a state, in their own domain."""
        return self.recipe.hparams(find_backend(state.free, backend=backend), state.free)

    def step(
        self, state: TunerState, train: Batches, val: Batches, *, backend: Backend | str | None = None
    ) -> tuple[TunerState, Step]:
        """Take one training step, or make an estimate with all of its training steps and update λ.

        In JAX a step is compiled, once for training alone and once for an update. It may also be part of your
        own program, ``jax.jit(tuner.step)``, which then contains both. A fault cannot be raised there: λ is
        not updated, and `check` raises the fault outside.

        Args:
            state: from `init` or the last step.
            train: batches of T1; see `hypergrad.problems.batches`. A function is called with the training
                step.
            val: a batch of T2, or a function called with the number of updates so far.
            backend: found from the arrays if it is not given.

        Raises:
            As `HypergradientEstimator.estimate`; the given state then remains valid.
        """
        backend = find_backend(state.inner.params, state.free, backend=backend)
        with self._undivided(backend):
            state = backend.constants(state)
            if not backend.readable(state.since):
                return Steps(self.recipe, backend).train_or_update(state, train, val)
            steps = Steps(self.recipe, backend, self._programs)
            if int(state.since) >= self.recipe.plain_steps:
                return steps.update(state, train, val)
            return steps.train(state, train)

    def tune(
        self, state: TunerState, train: Batches, val: Batches, *, backend: Backend | str | None = None
    ) -> tuple[TunerState, Step]:
        """Estimate dC2/dλ at the present θ and update λ, without training: for your own training loop.

        θ, the optimiser's state, the auxiliary state, the step count and random generators do not change; the
        hypergradient is that of `hypergrad.hypergradient`. For `Greedy` that means a training step that is
        evaluated but not taken. Put your own θ and optimiser state into ``state.inner`` first. `Implicit`
        averages over the batches of a list.

        Cost: that of the estimate. The arguments are those of `step`, and ``jax.jit`` works as it does there.

        Raises:
            ArgumentError: for an estimator that needs several training steps, or all of them.
            As `HypergradientEstimator.estimate`; the given state then remains valid.
        """
        backend = find_backend(state.inner.params, state.free, backend=backend)
        with self._undivided(backend):
            state = backend.constants(state)
            programs = self._programs if backend.readable(state.since) else None
            return Steps(self.recipe, backend, programs).tune(state, train, val)

    @contextmanager
    def _undivided(self, backend: Backend) -> Iterator[None]:
        """Run a block in which losses may draw, and hold signals back, which would leave draws half made.

        In JAX generators are arguments, and an interrupted step leaves nothing behind.
        """
        with nullcontext() if backend.compiles else Interrupts(), backend.random.turn(self.problem):
            yield

    def check(self, state: TunerState, step: Step, *, backend: Backend | str | None = None) -> None:
        """Raise the faults of a step, or of the last one of a run: ``check(run.state, run.last)``.

        Raises:
            As `HypergradientEstimator.check`.
        """
        backend = find_backend(state.inner.params, state.free, backend=backend)
        self.recipe.check(backend, state.inner.params, step)

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
        save_to: str | Path | None = None,
        save_every: int | None = None,
        keep: int | None = None,
        aux: Tree = None,
        backend: Backend | str | None = None,
    ) -> Run:
        """Train until ``steps`` training steps are done, and keep a history.

        In JAX the whole run is one compiled program, which stops at its first fault; batches are then
        functions of a traced step, or lists. With iterators it runs step by step, with both kinds of steps
        compiled. Under ``jax.vmap`` over starts, each start has its own history and its own ``last``.

        Args:
            params: θ_0.
            hparams: λ_0, in its own domain.
            train: batches of T1. A list starts again at its end; a function is called with the step.
            val: batches of T2, in turn, one for each update of λ.
            steps: training steps in all, those of a resumed run included.
            seed: seeds the framework's own generator for this run; its state is restored afterwards.
            progress: show a bar; by default on a terminal.
            resume: state and history of an earlier run, as `load` returns them.
            save_to, keep: a file to `save` to, or with ``keep`` a folder for that many files.
            save_every: after how many training steps to save; by default at the end alone.
            aux: the initial auxiliary state of losses that have one.
            backend: found from the arrays if it is not given.

        Raises:
            As `HypergradientEstimator.estimate` and `save`; ArgumentError if T1 or T2, as it says, runs out
            of batches. The error's ``run`` is the run up to the last update before it, in a compiled program
            up to the fault itself. KeyboardInterrupt after the round in which Ctrl-C was pressed, or at once
            at the second time; its ``run`` is the run so far. On Ctrl-C and on SIGTERM a run with ``save_to``
            saves before it ends.

        Warns:
            As `HypergradientEstimator.estimate`, once a run for each kind of warning. The columns of
            ``history.reports`` say of each update how its solve ended.
        """
        backend = find_backend(params, hparams, backend=backend)
        if resume is None:
            resume = self.init(params, hparams, aux=aux, backend=backend), History.start(backend, hparams)
        folder.check_saving("Tuner.run", save_to, save_every, keep, len(resume[1].inner_values))
        seeded = nullcontext() if seed is None else backend.random.replay(backend.random.state(seed))
        running: Running | None = None
        try:
            with (
                Interrupts(saves=save_to is not None) as interrupts,
                each_warning_once(set()),
                backend.random.turn(self.problem),
                seeded,
                show_progress("training", steps, progress) as advance,
            ):
                running = Running(self._programs, backend, resume, train, val, interrupts)
                advance(running.done, "")
                with suppress(Ended):
                    while running.done < steps:
                        running.go_on(min(save_every or steps, steps - running.done), advance)
                        if save_to is not None:
                            self.save(save_to, running.run, keep=keep, backend=backend)
                if interrupts.pending and save_to is not None:
                    self.save(save_to, running.run, keep=keep, backend=backend)
        except KeyboardInterrupt as stop:
            stop.run = None if running is None else running.run  # type: ignore[attr-defined]
            raise
        return running.run

    def record(self, history: History, step: Step, *, backend: Backend | str | None = None) -> History:
        """Return the history with one more step, the result of `step` or `tune`; begin with `History.start`.

        For your own loops: `run` does this itself, and can also resume from such a history.
        """
        recorder = Recorder(self.recipe, find_backend(step.hparams, backend=backend), step.hparams, history)
        recorder.add(step)
        return recorder.history

    # Saving.

    def save(
        self,
        path: str | Path,
        run: Saved,
        *,
        keep: int | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Write state and history to one ``.npz`` file. If that fails, an older file is unchanged.

        The state of the framework's generator is not saved: a run resumes bit for bit if its noise comes with
        the batches, as functions of the step.

        Args:
            path: a file; with ``keep`` a folder, in which the file is numbered by the training step.
            run: what `run` returned, or a state with its history.
            keep: how many files to keep in the folder, the newest ones.
            backend: found from the arrays if it is not given.

        Raises:
            OSError: if the file cannot be written.
            CheckpointError: if the folder has checkpoints of later steps, which are of another run.
        """
        state, history = parts(run)
        saved = written(self.recipe, find_backend(state.free, backend=backend), run)
        step = len(history.inner_values)
        folder.save(path, keep, step, lambda file: write_arrays(file, *saved))

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
            CheckpointError: if the file is damaged, or was written with another recipe, backend or structure;
                the message lists all differences.
            FileNotFoundError: if it does not exist.
        """
        expected = self._expected(params, hparams, aux, backend)
        return expected.read(read_arrays(path, lambda head: expected.check(head, str(path)))[1])

    def load_latest(
        self,
        path: str | Path,
        params: Tree,
        hparams: Tree,
        *,
        aux: Tree = None,
        backend: Backend | str | None = None,
    ) -> tuple[TunerState, History]:
        """Read the newest file of a folder to which ``save(..., keep=...)`` wrote, as `load` does.

        Raises:
            As `load`; CheckpointError if all files of the folder are damaged.

        Warns:
            CheckpointWarning: for a damaged file, in place of which an older one is read.
        """
        return folder.load_latest(
            path, lambda file: self.load(file, params, hparams, aux=aux, backend=backend)
        )

    def state_dict(self, run: Saved, *, backend: Backend | str | None = None) -> dict[str, Any]:
        """Return what `save` writes, as named NumPy arrays: for the files of your own program."""
        backend = find_backend(parts(run)[0].free, backend=backend)
        return sealed(*written(self.recipe, backend, run))

    def from_state_dict(
        self,
        stored: dict[str, Any],
        params: Tree,
        hparams: Tree,
        *,
        aux: Tree = None,
        backend: Backend | str | None = None,
    ) -> tuple[TunerState, History]:
        """Return state and history from what `state_dict` returned, as `load` does from a file.

        Raises:
            CheckpointError: as `load`.
        """
        expected = self._expected(params, hparams, aux, backend)
        head, arrays = opened(stored, "the state")
        expected.check(head, "the state")
        return expected.read(arrays)

    def _expected(self, params: Tree, hparams: Tree, aux: Tree, backend: Backend | str | None) -> Expected:
        backend = find_backend(params, hparams, backend=backend)
        return Expected(self.recipe, backend, self.init(params, hparams, aux=aux, backend=backend))
