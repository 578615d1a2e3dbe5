"""Hyperparameter tuning in an existing training loop: a module, a ``torch.optim`` optimiser, loaders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from hypergrad.backend import Tree
from hypergrad.backend.arguments import check_variables
from hypergrad.errors import NonFiniteError, each_warning_once
from hypergrad.estimators import Estimate, Greedy, HypergradientEstimator, State, Unrolled
from hypergrad.problems.batches import Feed
from hypergrad.problems.bilevel import Bilevel
from hypergrad.problems.step import Observation
from hypergrad.tuning import History, Real, Recipe, Step, folder
from hypergrad.tuning.interrupts import Ended, Interrupts
from hypergrad.tuning.progress import progress as show_progress
from hypergrad.tuning.progress import silent
from hypergrad.tuning.recipe import check_count
from hypergrad.tuning.recorder import Recorder
from hypergrad.tuning.spaces import Spaces
from hypergrad.updates import SGD, Adam, ClipNorm, UpdateRule
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.dialects import by_group, refuse_captured
from hypergrad_torch.module.checks import check_distinct, check_estimator, check_module, check_tuned
from hypergrad_torch.module.estimates import Estimates
from hypergrad_torch.module.functional import Functional, Hyperparameters, Loss
from hypergrad_torch.module.hyper import Tuned
from hypergrad_torch.module.losses import Objective
from hypergrad_torch.module.optimizer_step import HyperOptimizer, LearnedOptions, Trainer
from hypergrad_torch.module.saving import Saving
from hypergrad_torch.module.training import Training
from hypergrad_torch.module.window import Window
from hypergrad_torch.optimizers import TorchOptimizer
from hypergrad_torch.private import Later, read_later
from hypergrad_torch.randomness import generators


@final
class ModuleTuner(Saving):
    r"""Train a module in place as its optimiser would, and update λ once in every ``every`` steps.

        θ ← optimizer.step()             every step, bit for bit what one's own loop would do
        u ← u − hyper_update(dC2/du)     once in every ``every`` steps, dC2/du = (∂λ/∂u)ᵀ dC2/dλ

    The losses use the module as usual. At an update the training gradient keeps its graph, the optimiser
    takes its real step, C2 is evaluated at the new θ, and its gradient is pulled back through the formula of
    the step (`torch.optim.SGD`, `Adam`, `AdamW`, `RMSprop`, `Adagrad`) into λ: nothing is computed twice.
    Buffers change once a step. The validation pass leaves no trace: generators, buffers and train/eval mode
    are as after the training pass, and ``.grad`` stays as it is. After an error everything is as before the
    call, except if the optimiser's own step fails where λ is not updated. Ctrl-C and SIGTERM wait for the end
    of a step. A second Ctrl-C does not, and the tuner then refuses to go on until a state is loaded.

    This is `hypergrad.Tuner` with the module as its state, and with the same `Recipe`. So there is no
    ``resume``, which is `load` or `load_state_dict`; no ``aux``, which is the module's buffers; no
    ``update``, which is the optimizer; and `step` takes a batch at a time, as a loader gives it. On the other
    hand ``max_norm`` and ``micro_batches`` stand here, because torch's optimisers and gradients have no place
    for them, while a `Tuner` has them in its update rule and in its loss.

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
        estimator: by default ``hg.Greedy(optimizer)``; with a `TorchOptimizer` in its place options of the
            optimiser can be functions of λ, such as its rates. `Unrolled(optimizer, steps=T)` differentiates
            the last T steps, which it takes again on copies; `Implicit` takes none. (`Forward` would carry
            its tangents through every step: take `Unrolled`.)
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
        space: Spaces | None = None,
        hyper_update: UpdateRule | Optimizer | None = None,
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
        self.model, self.optimizer, self.hparams = model, optimizer, hparams
        self.hyper_update = rule = Adam(1e-2) if hyper_update is None else hyper_update
        estimator = Greedy(optimizer) if estimator is None else estimator
        objective = Objective(Bilevel(inner, outer), Functional(model, hyper), micro_batches)
        check_estimator(estimator, optimizer)
        self.recipe = Recipe(
            objective.problem,
            estimator,
            Real() if space is None else space,
            HyperOptimizer(Trainer(rule, hyper.by_path(lam))) if isinstance(rule, Optimizer) else rule,
            every,
            None if estimator.training_steps else optimizer,
            restart,
        )
        trained_by = getattr(estimator, "update", None)
        hypers = by_group(optimizer, trained_by.hypers if isinstance(trained_by, TorchOptimizer) else {})
        learned = LearnedOptions(hypers, lambda: self._tuned.values) if any(hypers) else None
        self._described = {
            **{"estimator": estimator, "optimizer": optimizer, "hyper_update": rule, "every": every},
            **{"space": self.recipe.space, "restart": restart, "max_norm": max_norm},
            "micro_batches": micro_batches,
        }
        self._training = Training(backend, model, optimizer, objective, self.recipe, max_norm, learned)
        check_variables(backend, params=self._training.trainer.values(), hparams=lam)
        check_tuned(backend, lam, rule)
        check_distinct(backend, lam, self._training.trainer.params.values())
        refuse_captured(optimizer, backend.paths(lam, "hparams"), backend.flatten(lam)[0])
        self._tuned = Tuned(backend, hyper, self.recipe)
        self._estimates = Estimates(backend, objective, self._training)
        self._recorder = Recorder(self.recipe, backend, self._tuned.values)
        self._memory = self._fresh_memory()
        self._unread: list[tuple[Later, Step]] = []
        """Updates of which it is not known yet whether they were sound, the oldest first."""
        self._interrupts = Interrupts()
        self._given: set[Any] = set()
        """The kinds of warnings that were given, which is done once."""

    @property
    def steps(self) -> int:
        """Training steps until now."""
        return self._training.steps

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
        with self._turn():
            self._raise_fault(wait=False)
            self._refresh()
            training, estimator = self._training, self.recipe.estimator
            due = training.since + 1 == self.recipe.period
            again, record = training.begins_again, training.record(train_batch)
            with (
                training.undone_on_failure(record, due or again) as start,
                self._tuned.undone_on_failure(due),
            ):
                if again:
                    start = training.begin_again()
                    record = training.record(train_batch)
                window = training.window_from_here()
                if due and isinstance(estimator, Greedy):
                    assert start is not None
                    step = self._update(self._estimates.of_the_step(estimator, record, val_batch, start), 1)
                else:
                    value, record = training.step(record)
                    step = Step(Observation(value, float("nan")), 1, False, None, 0, self._tuned.values)
                    if window is not None:
                        window = window._replace(records=(*window.records, record))
                    if due:
                        out = (
                            self._estimates.where_it_stands(estimator, record, val_batch, self._memory)
                            if window is None
                            else self._estimates.of_a_window(estimator, window, val_batch)
                        )
                        step = self._update(out._replace(inner_value=value), 1)
                self._finish(step, window, 0 if due and isinstance(estimator, Greedy) else 1)
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
        self.recipe.check_can_tune()
        with self._turn():
            self._raise_fault(wait=False)
            self._refresh()
            training, estimator = self._training, self.recipe.estimator
            if isinstance(estimator, Unrolled):  # of one step, which is the same
                estimator = Greedy(estimator.update, allow_unused=estimator.allow_unused)
            record = training.record(train_batch)
            with (
                training.undone_on_failure(record, False),
                self._tuned.undone_on_failure(True),
            ):
                out = (
                    self._estimates.of_a_step_on_copies(estimator, record, val_batch)
                    if isinstance(estimator, Greedy)
                    else self._estimates.where_it_stands(estimator, record, val_batch, self._memory)
                )
                step = self._update(out, 0)
                self._finish(step, None, 0)
        return step

    def run(
        self,
        train: Any,
        val: Any,
        steps: int,
        *,
        seed: int | None = None,
        progress: bool | None = None,
        save_to: str | Path | None = None,
        save_every: int | None = None,
        keep: int | None = None,
    ) -> History:
        """Train until ``steps`` training steps are done, and return the history of all of them.

        Args:
            train: batches of T1: a loader or a list, which start again at their end, an iterator, or a
                function of the training step. A tensor, a dict or a tuple is one batch for every step.
            val: batches of T2 in the same forms, in turn, one for each update of λ.
            steps: training steps in all, those before this call included.
            seed: makes torch's own generators start from here, and puts them back afterwards.
            progress: show a bar; by default on a terminal.
            save_to, keep: a file to `save` to, or with ``keep`` a folder for that many files.
            save_every: after how many training steps to save; by default at the end alone.

        Raises:
            As `step` and `save`; ArgumentError if T1 or T2 runs out, and says which. On Ctrl-C and on SIGTERM
            a run with ``save_to`` saves before it ends.
        """
        folder.check_saving("ModuleTuner.run", save_to, save_every, keep, self.steps)
        train_feed, val_feed = Feed("train", train, self.steps), Feed("val", val, self.updates)
        seeded = nullcontext() if seed is None else generators.replay(generators.state(seed))
        interrupts = self._interrupts
        interrupts.saves = save_to is not None
        with self._turn(undo=False), seeded, show_progress("training", steps, progress) as advance:
            advance(self.steps, "")
            with suppress(Ended):
                while self.steps < steps:
                    due = self._training.since + 1 == self.recipe.period
                    with interrupts.released():
                        batches = next(train_feed), next(val_feed) if due else None
                    step = self.step(*batches)
                    advance(1, "" if advance is silent else f"T1 {float(step.inner_value):.3f}")
                    if save_to is not None and self.steps % (save_every or steps) == 0:
                        self.save(save_to, keep=keep)
            if save_to is not None and (interrupts.pending or self.steps % (save_every or steps)):
                self.save(save_to, keep=keep)
        return self.history

    def check(self, step: Step) -> None:
        """Raise what the last step has to report; waits for a device if it must.

        On a CPU `step` has raised it. A device is not waited for: after a fault λ is not updated, but the
        module has taken its step, and the first later step to which the fault is known raises it, as does
        `state_dict`.

        Raises:
            As `HypergradientEstimator.check`.
        """
        if not torch.isfinite(step.inner_value):
            raise NonFiniteError("T1", max(self.steps - 1, 0))
        self.recipe.check(self._backend, self._training.trainer.values(), step)

    # The parts of a step.

    @contextmanager
    def _turn(self, undo: bool = True) -> Iterator[None]:
        """Run the block in a turn of this tuner's losses; signals wait for its end.

        Each kind of warning is given once. With ``undo`` generators are restored if the block fails.
        """
        with (
            self._interrupts,
            each_warning_once(self._given),
            generators.turn(self.recipe.problem, undo),
        ):
            self._interrupts.check()
            yield

    def _update(self, out: Estimate[Any], trained: int) -> Step:
        """λ updated by an estimate."""
        training, observed = self._training, Observation(out.inner_value, out.report.inner_gradient_norm)
        allowed = self.recipe.allows(self._backend, out, observed)
        clipped = self._tuned.update(out.hypergradient, allowed)
        out = out._replace(state=State(training.trainer.values(), None, training.steps, out.state.memory))
        step = Step(observed, trained, True, out, clipped, self._tuned.values)
        later = read_later(allowed) if isinstance(allowed, torch.Tensor) else None
        if later is not None:
            self._unread.append((later, step))
        return step

    def _raise_fault(self, wait: bool) -> None:
        """Raise the first fault of earlier updates, as far as it is known by now; with ``wait`` find out.

        Raises:
            As `check`.
        """
        while self._unread and (wait or self._unread[0][0].ready):
            sound, step = self._unread.pop(0)
            if not sound():
                self.check(step)

    def _finish(self, step: Step, window: Window | None, gradients: int) -> None:
        """Note that a step is done, and how many training gradients its estimate does not count."""
        updated = step.estimate is not None
        if step.estimate is not None:
            self._memory = step.estimate.state.memory
        self._training.since = 0 if updated else self._training.since + 1
        self._training.window = None if updated else window
        self._recorder.add(step, gradients)

    def _refresh(self) -> None:
        if self._training.refresh():
            self._memory = self._fresh_memory()

    def _fresh_memory(self) -> Tree:
        """What an estimator that does not train remembers before its first estimate."""
        if self.recipe.trains:
            return None
        given = self.recipe.problem, self._training.trainer.values(), self._tuned.values
        return self.recipe.estimator.init(*given, backend=self._backend).memory
