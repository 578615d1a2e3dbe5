"""T1−T2 in the loop that one already has: a module, a ``torch.optim`` optimiser, batches of a loader."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad.backend import Tree
from hypergrad.backend.arguments import check_variables
from hypergrad.errors import ArgumentError, CheckpointError, NonFiniteError, UnsupportedOpError
from hypergrad.estimators import Estimate, Greedy, HypergradientEstimator, State, Unrolled
from hypergrad.problems.bilevel import Bilevel
from hypergrad.problems.step import Seen
from hypergrad.tuning import History, Real, Recipe, Step
from hypergrad.tuning.progress import progress as show_progress
from hypergrad.tuning.progress import silent
from hypergrad.tuning.recipe import check_count
from hypergrad.tuning.recorder import Recorder
from hypergrad.updates import SGD, Adam, ClipNorm
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.module.checkpoint import read_history, read_tree, write_history, write_tree
from hypergrad_torch.module.checks import (
    check_distinct,
    check_estimator,
    check_module,
    check_tuned,
    trained,
)
from hypergrad_torch.module.estimates import Estimates
from hypergrad_torch.module.functional import Buffers, Functional, Hyperparameters, Loss
from hypergrad_torch.module.hyper import Before, Tuned
from hypergrad_torch.module.loader import Feed
from hypergrad_torch.module.losses import Objective
from hypergrad_torch.module.optimizer_step import HyperOptimizer, Trainer
from hypergrad_torch.module.snapshot import Snapshot
from hypergrad_torch.module.window import Record, Window, read, write
from hypergrad_torch.randomness import Draws, generator, replay, restore


class _Start(NamedTuple):
    """Where a module tuner began: to go back there with ``restart``."""

    theta: Snapshot
    buffers: Buffers


class _Before(NamedTuple):
    """Training and tuning as they were before a step."""

    theta: Snapshot
    lam: Before


@final
class ModuleTuner:
    r"""Train a module in place as its optimiser would, and update λ once in every ``every`` steps.

        θ ← optimizer.step()             every step, bit for bit what one's own loop would do
        u ← u − hyper_update(dC2/du)     once in every ``every`` steps, dC2/du = (∂λ/∂u)ᵀ dC2/dλ

    The losses use the module as usual. At an update the training gradient keeps its graph, the optimiser
    takes its real step, C2 is evaluated at the new θ, and its gradient is pulled back through the formula of
    the step (`torch.optim.SGD`, `Adam`, `AdamW`, `RMSprop`, `Adagrad`) into λ: nothing is computed twice.
    Buffers change once a step. The validation pass leaves no trace: generators, buffers and train/eval mode
    are as after the training pass, and ``.grad`` stays as it is. After an error everything is as before the
    call, except if the optimiser's own step fails where λ is not updated.

    This is `hypergrad.Tuner` with the module as its state, and with the same `Recipe`. So there is no
    ``resume``, which is `load_state_dict`; no ``aux``, which is the module's buffers; no ``update``, which is
    the optimizer; no ``save`` and ``load``, since `state_dict` goes into the user's own ``torch.save``; and
    `step` takes a batch at a time, as a loader gives it. On the other hand ``max_norm`` and
    ``micro_batches`` stand here, because torch's optimisers and gradients have no place for them, while a
    `Tuner` has them in its update rule and in its loss.

    Buffers are constants: a C2 that reads BatchNorm's running statistics (in eval mode) depends on λ through
    them too, and that path is not differentiated. A NaN in a training gradient is looked for at an update,
    and in the loss at every step.

    A step without an update costs one's own step. An update costs a validation gradient and one product
    more, and copies of θ and of the optimiser's state.

    Args:
        model: the module; trained are those of its parameters that the optimiser holds.
        optimizer: any ``torch.optim`` optimiser, schedulers included. Differentiated through are those named
            above; for others pass ``estimator=hg.Greedy(optimizer, response="gradient")``.
        hparams: λ, a tree of tensors and modules. A module stands for its parameters.
        inner: ``inner(model, hparams, batch)``, the training loss C̃1 on T1.
        outer: ``outer(model, hparams, batch)``, the validation loss C2 on T2, in the mode that the module is
            in; a loss may call ``model.eval()`` and need not undo it.
        estimator: by default ``hg.Greedy(optimizer)``. `Unrolled(optimizer, steps=T)` differentiates the last
            T steps, which it takes again on copies; `Implicit` takes none. (`Forward` would carry its
            tangents through every step: take `Unrolled`.)
        space: a space such as `hypergrad.Positive`, or a tree of them with the structure of λ.
        hyper_update: the update rule of λ in free coordinates u: a rule such as `hypergrad.Adam`, or a
            ``torch.optim`` optimiser that holds tensors of ``hparams``. For its step these tensors hold u and
            their ``.grad`` is dC2/du, so what it remembers is of u. Tensors that it does not hold get their
            hypergradient and stay as they are.
        every: training steps for each update of λ; T of them for an unroll of T > ``every``.
        restart: begin every estimate's training steps at the parameters, buffers and optimiser state again
            with which the tuner was made.
        max_norm: clip the norm of the training gradient, as ``torch.nn.utils.clip_grad_norm_``; the
            clipping is differentiated.
        micro_batches: accumulate the gradient over so many: a training batch is then a sequence of them,
            and its loss their mean.

    Raises:
        ArgumentError: for arguments that do not fit one another, and for a λ outside of its space.
        LeafTypeError: for hyperparameters that are not floating point.
        UnsupportedOpError: for an optimiser that cannot be differentiated through, and for compiled,
            distributed and sharded modules.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        hparams: Tree,
        *,
        inner: Loss,
        outer: Loss,
        estimator: HypergradientEstimator | None = None,
        space: Any = None,
        hyper_update: Any = None,
        every: int = 10,
        restart: bool = False,
        max_norm: float | None = None,
        micro_batches: int = 1,
    ) -> None:
        check_module(model)
        check_count("micro_batches", micro_batches)
        if max_norm is not None:
            ClipNorm(SGD(0.1), max_norm)  # refuses what is no norm
        backend = self._backend = TorchBackend()
        hyper = Hyperparameters(hparams)
        lam = hyper.tensors()
        trainer = Trainer(optimizer, trained(model, optimizer), max_norm)
        self.model, self.optimizer, self.hparams = model, optimizer, hparams
        self.hyper_update = Adam(1e-2) if hyper_update is None else hyper_update
        estimator = Greedy(optimizer) if estimator is None else estimator
        check_estimator(estimator, optimizer)
        problem, rule = Bilevel(inner, outer), self.hyper_update
        self.recipe = Recipe(
            problem,
            estimator,
            Real() if space is None else space,
            HyperOptimizer(Trainer(rule, hyper.by_path(lam))) if isinstance(rule, Optimizer) else rule,
            every,
            None if estimator.training_steps else optimizer,
            restart,
        )
        check_variables(backend, params=trainer.values(), hparams=lam)
        check_tuned(backend, lam, rule)
        check_distinct(backend, lam, trainer.params.values())
        objective = Objective(problem, Functional(model, hyper), micro_batches)
        self._estimates = Estimates(backend, objective, trainer)
        self._tuned = Tuned(backend, hyper, self.recipe)
        self._recorder = Recorder(self.recipe, backend, History.start(backend, self._tuned.values))
        self._start = _Start(Snapshot.take(trainer), objective.functional.buffers()) if restart else None
        self._memory = self._fresh_memory()
        self._since = 0
        self._window: Window | None = None

    @property
    def steps(self) -> int:
        """Training steps until now."""
        return self._recorder.trained

    @property
    def updates(self) -> int:
        """Updates of λ until now."""
        return self._tuned.updates

    @property
    def history(self) -> History:
        """Losses, hyperparameters and reports until now; waits for a device if it must."""
        return self._recorder.history

    def step(self, train_batch: Any, val_batch: Any) -> Step:
        """Train on a batch of T1; where an update is due, estimate dC2/dλ on the batch of T2 and update λ.

        In the `Step`, ``observed.gradient_norm`` is NaN without an update, ``hparams`` are constants in which
        a module is a dict of its tensors, and the parameters in ``estimate.state`` are the module's own.

        Raises:
            As `HypergradientEstimator.estimate`, and whatever the losses raise.
        """
        self._refresh()
        begins = self._since == self.recipe.plain_steps
        due = self._since + 1 == self.recipe.period
        again = begins and self.recipe.restart
        record = self._record(train_batch)
        with self._undone_on_failure(record, due or again) as before:
            if again:
                self._begin_again()
                record = self._record(train_batch)
            window = self._window
            if begins and isinstance(self.recipe.estimator, Unrolled):
                window = Window(Snapshot.take(self._trainer))
            if due and isinstance(self.recipe.estimator, Greedy):
                assert before is not None
                start = Snapshot.take(self._trainer) if again else before.theta
                out = self._estimates.of_the_step(self.recipe.estimator, record, val_batch, start, self.steps)
                step = self._update(out, 1, before)
            else:
                value, used = self._train(record.batch)
                if window is not None:
                    record = replace(record, taken=record.taken._replace(used=used))
                    window = window._replace(records=(*window.records, record))
                if before is None or not due:
                    step = Step(self._observed(value), 1, False, None, 0, self._tuned.values)
                else:
                    out = self._look_back(window, record, val_batch)
                    step = self._update(out._replace(inner_value=value), 1, before)
        self._since, self._window = (0, None) if due else (self._since + 1, window)
        counted = due and isinstance(self.recipe.estimator, Greedy)
        self._recorder.add(step, 0 if counted else 1)
        return step

    def tune(self, train_batch: Any, val_batch: Any) -> Step:
        """Estimate dC2/dλ where θ stands and update λ, without training: for a training loop of your own.

        Parameters, buffers, ``.grad``, the optimiser's state and random generators stay as they are. For
        `Greedy` the optimiser takes its step on copies, so that the hypergradient is, bit for bit, the one
        that `step` would have had. It counts as an update, from which the ``every`` steps begin again.

        Cost: that of the estimate, and copies of θ and of the optimiser's state.

        Raises:
            ArgumentError: for an estimator that needs several training steps.
            As `HypergradientEstimator.estimate`, and whatever the losses raise.
        """
        self.recipe.check_tunes()
        self._refresh()
        record, estimator = self._record(train_batch), self.recipe.estimator
        with self._undone_on_failure(record, True) as before, replay(record.draws):
            assert before is not None
            if isinstance(estimator, Unrolled):  # of one step, which is the same
                estimator = Greedy(estimator.update, allow_unused=estimator.allow_unused)
            if isinstance(estimator, Greedy):
                out = self._estimates.of_a_step_on_copies(estimator, record, val_batch, self.steps)
            else:
                out = self._estimates.where_it_stands(estimator, record, val_batch, self.steps, self._memory)
            step = self._update(out, 0, before)
        self._since, self._window = 0, None
        self._recorder.add(step, 0)
        return step

    def run(
        self, train: Any, val: Any, steps: int, *, seed: int | None = None, progress: bool | None = None
    ) -> History:
        """Train until ``steps`` training steps are done, and return the history of all of them.

        Args:
            train: batches of T1: a loader or a list, which start again at their end, an iterator, or a
                function of the training step. A tensor, a dict or a tuple is one batch for every step.
            val: batches of T2 in the same forms, in turn, one for each update of λ.
            steps: training steps in all, those before this call included.
            seed: makes torch's own generators start from here, and puts them back afterwards.
            progress: show a bar; by default on a terminal.

        Raises:
            As `step`; ArgumentError if T1 or T2 runs out, and says which.
        """
        train_feed, val_feed = Feed("train", train), Feed("val", val)
        seeded = nullcontext() if seed is None else replay(generator(seed))
        with seeded, show_progress("training", steps, progress) as advance:
            advance(self.steps, "")
            while self.steps < steps:
                due = self._since + 1 == self.recipe.period
                step = self.step(train_feed(self.steps), val_feed(self.updates) if due else None)
                advance(1, "" if advance is silent else f"T1 {float(step.inner_value):.3f}")
        return self.history

    def check(self, step: Step) -> None:
        """Raise what the last step has to report; waits for a device if it must.

        On a CPU `step` has raised it. On a CUDA device the loss is not waited for: after a fault λ is not
        updated, but the module has taken its step.

        Raises:
            As `HypergradientEstimator.check`.
        """
        if not torch.isfinite(step.inner_value):
            raise NonFiniteError("T1", max(self.steps - 1, 0))
        self.recipe.check(self._backend, self._trainer.values(), step)

    # The parts of a step.

    @property
    def _trainer(self) -> Trainer:
        return self._estimates.trainer

    @property
    def _functional(self) -> Functional:
        return self._estimates.objective.functional

    def _train(self, batch: Any) -> tuple[Tensor, list[bool]]:
        """The user's own step: its loss, and which parameters had a gradient."""
        value, gradients = self._estimates.objective.training_gradient(
            self._backend, batch, self._trainer.params
        )
        if self._backend.readable(value) and not torch.isfinite(value):
            raise NonFiniteError("T1", self.steps)
        self._trainer.step(gradients)
        return value, [gradients[name] is not None for name in sorted(gradients)]

    def _look_back(self, window: Window | None, record: Record, val_batch: Any) -> Estimate:
        """An estimate after the training step: of the steps in the window, or where θ stands."""
        estimator, step = self.recipe.estimator, self.steps + 1
        if window is None:
            return self._estimates.where_it_stands(estimator, record, val_batch, step, self._memory)
        return self._estimates.of_a_window(estimator, window, val_batch, step)

    def _update(self, out: Estimate, trained: int, before: _Before) -> Step:
        """λ updated by an estimate."""
        observed = Seen(out.inner_value, out.report.inner_gradient_norm)
        allowed = self.recipe.allows(self._backend, out, observed)
        clipped = self._tuned.update(before.lam, out.hypergradient, allowed)
        if not self.recipe.trains:
            self._memory = out.state.memory
        out = out._replace(state=State(self._trainer.values(), (), self.steps + trained, self._memory))
        return Step(observed, trained, True, out, clipped, self._tuned.values)

    def _observed(self, value: Tensor) -> Seen:
        return Seen(value, float("nan"))

    def _begin_again(self) -> None:
        """Put parameters, buffers and the optimiser's state back to where they began."""
        assert self._start is not None
        self._start.theta.restore()
        self._functional.set_buffers(self._start.buffers)

    def _record(self, batch: Any) -> Record:
        functional = self._functional
        return Record(batch, generator(), functional.buffers(), functional.modes(), self._trainer.now())

    @contextmanager
    def _undone_on_failure(self, record: Record, everything: bool) -> Iterator[_Before | None]:
        """Put generators and buffers back if the block fails, and with ``everything`` module, optimisers and λ.

        A step that does not update λ fails, if at all, before the optimiser has moved θ.
        """
        before = _Before(Snapshot.take(self._trainer), self._tuned.before()) if everything else None
        memory = self._memory
        try:
            yield before
        except BaseException:
            restore(record.draws)
            self._functional.set_buffers(record.buffers)
            if before is not None:
                before.theta.restore()
                self._tuned.restore(before.lam)
                self._memory = memory
            raise

    def _refresh(self) -> None:
        """Look again at what is trained: parameters may have been frozen, freed, added or hooked."""
        params = trained(self.model, self.optimizer)
        now, before = ({name: id(p) for name, p in held.items()} for held in (params, self._trainer.params))
        if now != before:
            if self._window is not None:
                raise ArgumentError(
                    "ModuleTuner: the parameters that the optimizer trains have changed within the steps "
                    f"that {type(self.recipe.estimator).__name__} differentiates through"
                )
            self._estimates = replace(self._estimates, trainer=replace(self._trainer, params=params))
            self._memory = self._fresh_memory()
        if self._estimates.objective.micro_batches > 1 and self._trainer.has_hooks:
            raise UnsupportedOpError(
                "gradient hooks of parameters are called for each micro-batch, and what they do together is "
                "not differentiated: use micro_batches=1, or change gradients in the loss"
            )

    def _fresh_memory(self) -> Tree:
        """What an estimator that does not train remembers before its first estimate."""
        if self.recipe.trains:
            return ()
        given = self.recipe.problem, self._trainer.values(), self._tuned.values
        return self.recipe.estimator.init(*given, backend=self._backend).memory

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit: module, optimisers, λ, generators, clocks, history.

        Plain containers of tensors, which ``torch.load(..., weights_only=True)`` reads.
        """
        draws, start = generator(), self._start
        return {
            "since": self._since,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tuned": self._tuned.write(),
            "memory": write_tree(self._memory, "memory"),
            "draws": [draws.cpu, *draws.cuda],
            "window": None if self._window is None else write(self._window),
            "start": None if start is None else {"theta": start.theta.write(), "buffers": start.buffers},
            "history": write_history(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            CheckpointError: if it belongs to something else; everything is then as it was.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            self._load(before)
            raise CheckpointError(f"the state belongs to another run or structure: {error}") from error

    def _load(self, state: dict[str, Any]) -> None:
        history = read_history(state["history"])
        self._tuned.read(state["tuned"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._memory = read_tree(state["memory"], self._memory, "memory")
        cpu, *cuda = state["draws"]
        restore(Draws(cpu, tuple(cuda)))
        trainer, window, start = self._trainer, state["window"], state["start"]
        self._window = None if window is None else read(trainer, window)
        if start is not None:
            self._start = _Start(Snapshot.read(trainer, start["theta"]), start["buffers"])
        self._since = int(state["since"])
        self._recorder = Recorder(self.recipe, self._backend, history)
