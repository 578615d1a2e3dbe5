"""T1−T2 in the loop that one already has: a module, a ``torch.optim`` optimiser, batches of a loader."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad.backend import Tree, vectors
from hypergrad.backend.arguments import check_scalar, check_variables
from hypergrad.errors import ArgumentError, CheckpointError, NonFiniteError, ReplayError, UnsupportedOpError
from hypergrad.estimators import Estimate, Greedy, HypergradientEstimator, Implicit, State, Unrolled
from hypergrad.problems.bilevel import Bilevel
from hypergrad.updates import SGD, ClipNorm
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.graph import detach, history, reached_by, trees
from hypergrad_torch.modules import Buffers, Hyperparameters, Loss, Losses, check_module, has_two_formulas
from hypergrad_torch.optimizers import TorchOptimizer, dialect
from hypergrad_torch.randomness import Draws, Generators
from hypergrad_torch.records import Record, Window, read, write
from hypergrad_torch.training import Hooked, InPlace, Snapshot, Trainer, trained

_generators = Generators(None)
generator, replay, restore = _generators.state, _generators.replay, _generators.restore


class Metrics(NamedTuple):
    """What one step saw. ``outer_value`` and ``estimate`` are ``None`` where λ did not move.

    The parameters in ``estimate.state`` are the module's own, which move on.
    """

    inner_value: Tensor
    outer_value: Tensor | None
    estimate: Estimate | None


@final
class _Pass:
    """The losses during one estimate, and what its training pass leaves behind.

    If ``live`` the first evaluation of C̃1 is the training itself, and what it leaves is kept; otherwise
    training is over, and the module stands as it left it. C2 is judged after it, and leaves nothing.
    """

    def __init__(self, tuner: ModuleTuner, live: bool) -> None:
        self._tuner, self._losses, self._live = tuner, tuner._losses, live
        self.buffers, self.draws, self._modes = self._losses.buffers(), generator(), self._losses.modes()
        self._gradients: dict[str, Tensor | None] | None = None
        self._used: dict[str, bool] = {}

    def inner(self, theta: dict[str, Tensor], lam: Tree, record: Record) -> Tensor:
        theta, buffers, terms = _variables(theta), _copies(record.buffers), []
        with replay(record.draws):
            for part in self._tuner._micro(record.batch):
                term = self._losses(self._tuner.inner, theta, lam, part, buffers, record.modes)
                terms.append(self._tuner._share(term))
            draws = generator()
        value: Tensor = sum(terms[1:], terms[0])
        if self._live and isinstance(value, Tensor):
            self._live, self.buffers, self.draws = False, detach(buffers), draws
            self._look_at(terms, theta)
        return value

    def outer(self, theta: dict[str, Tensor], lam: Tree, batch: Any) -> Tensor:
        with replay(self.draws):
            buffers = _copies(self.buffers)
            return self._losses(self._tuner.outer, _variables(theta), lam, batch, buffers, self._modes)

    def plain(self, gradients: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The training gradients to the bit, and none where the loss does not depend on a parameter."""
        if self._gradients is not None:
            return self._tuner._trainer.hooked(self._gradients)
        # Clipping works in place, on what the formula goes on to use.
        clipped = self._tuner._trainer.max_norm is not None
        return {
            name: None if not self._used[name] else g.detach().clone() if clipped else g.detach()
            for name, g in gradients.items()
        }

    def _look_at(self, terms: list[Tensor], theta: dict[str, Tensor]) -> None:
        """See which parameters are used; take gradients without a graph where those with one differ."""
        nodes = history(terms)
        self._used = dict(zip(theta, reached_by(list(theta.values()), nodes), strict=True))
        if len(terms) > 1 or has_two_formulas(nodes):
            self._gradients = _summed([_gradients(term, theta, keep=True) for term in terms])


@final
class ModuleTuner:
    r"""Train a module in place as its optimiser would, and move λ once in every ``every`` steps.

        θ ← optimizer.step()             every step, bit for bit what one's own loop would do
        λ ← hyper_optimizer.step()       every ``every`` steps, with dC2/dλ as its gradient

    The losses use the module as usual. Where λ moves, the training gradient keeps its graph, the optimiser
    takes its real step, C2 is judged at the new θ, and its gradient is pulled back through the step's own
    formula (`torch.optim.SGD`, `Adam`, `AdamW`, `RMSprop`, `Adagrad`) into λ: nothing is computed twice.
    Buffers move once a step. The validation pass leaves no trace: generators, buffers and train/eval mode
    are as after the training pass, and ``.grad`` as it was found. After an error everything is as before
    the call, unless it is the optimiser's own step that fails where λ does not move.

    Buffers are constants: a C2 that reads BatchNorm's running statistics (in eval mode) depends on λ through
    them too, and that path is not differentiated. A NaN in a training gradient is looked for where λ moves,
    and in the loss at every step.

    A step that does not move λ costs one's own step; one that does costs a validation gradient and one
    product more, and copies of θ and of the optimiser's state.

    Args:
        model: the module; trained are those of its parameters that the optimiser holds.
        optimizer: any ``torch.optim`` optimiser, schedulers included. Differentiated through are those named
            above; for others pass ``estimator=hg.Greedy(optimizer, response="gradient")``.
        hparams: λ, a tree of tensors and modules. A module stands for its parameters.
        inner: ``inner(model, hparams, batch)``, the training loss C̃1 on T1.
        outer: ``outer(model, hparams, batch)``, the validation loss C2 on T2, in the mode that the module is
            in; a loss may call ``model.eval()`` and need not undo it.
        hyper_optimizer: a ``torch.optim`` optimiser over the tensors of ``hparams``; those that it does not
            hold get their hypergradient and stay where they are.
        every: training steps for each update of λ.
        estimator: by default ``hg.Greedy(optimizer)``; `Unrolled(optimizer, steps=T)` with T ≤ ``every``
            differentiates the last T steps, which it takes again on copies; `Implicit` trains none.
        max_norm: clip the norm of the training gradient, as ``torch.nn.utils.clip_grad_norm_``; the
            clipping is differentiated.
        micro_batches: accumulate the gradient over so many: a training batch is then a sequence of them,
            and its loss their mean.

    Raises:
        ArgumentError: for arguments that do not fit one another.
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
        hyper_optimizer: Optimizer,
        every: int = 10,
        estimator: HypergradientEstimator | None = None,
        max_norm: float | None = None,
        micro_batches: int = 1,
    ) -> None:
        check_module(model)
        for name, value in (("every", every), ("micro_batches", micro_batches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"ModuleTuner: {name} = {value!r}; it is a positive integer")
        self._backend = TorchBackend()
        self.model, self.optimizer, self.hyper_optimizer = model, optimizer, hyper_optimizer
        self.inner, self.outer, self.every, self.micro_batches = inner, outer, every, micro_batches
        self._hyper = Hyperparameters(hparams)
        self._losses = Losses(model, self._hyper)
        self._trainer = Trainer(optimizer, trained(model, optimizer), max_norm)
        self._mover = Trainer(hyper_optimizer, self._named(self._hyper.tensors()))
        self.estimator = self._checked(Greedy(optimizer) if estimator is None else estimator)
        check_variables(self._backend, params=self._trainer.values(), hparams=self._hyper.tensors())
        _check_tuned(self._backend, self._hyper.tensors(), hyper_optimizer)
        _check_distinct(self._backend, self._hyper.tensors(), self._trainer.params.values())
        if max_norm is not None:
            ClipNorm(SGD(0.1), max_norm)  # refuses what is no norm
        self.steps = 0
        self._window: Window | None = None

    @property
    def hparams(self) -> Tree:
        """λ, the tree that was given; its tensors move in place."""
        return self._hyper.tree

    def step(self, train_batch: Any, val_batch: Any) -> Metrics:
        """Train on a batch of T1; at every ``every``-th call estimate dC2/dλ on the batch of T2 and move λ.

        Raises:
            As `HypergradientEstimator.estimate`, and whatever the losses raise.
        """
        tune = (self.steps + 1) % self.every == 0
        self._refresh()
        record = self._record(train_batch)
        with self._undone_on_failure(record, everything=tune) as start:
            metrics, window = self._step(record, val_batch, start)
        self.steps += 1
        self._window = None if tune else window
        return metrics

    # One step.

    def _step(self, record: Record, val_batch: Any, start: Snapshot | None) -> tuple[Metrics, Window | None]:
        if start is not None and isinstance(self.estimator, Greedy):
            out = self._greedy(self.estimator, record, val_batch, start)
        else:
            window = self._window_from_here()
            value, used = self._train(record.batch)
            record = replace(record, taken=record.taken._replace(used=used))
            if window is not None:
                window = window._replace(records=(*window.records, record))
            if start is None:
                return Metrics(value, None, None), window
            out = self._look_back(window, record, val_batch)._replace(inner_value=value)
        self._move(out.hypergradient)
        out = out._replace(state=State(self._trainer.values(), (), self.steps + 1))
        return Metrics(out.inner_value, out.outer_value, out), None

    def _train(self, batch: Any) -> tuple[Tensor, list[bool]]:
        """The user's own step: its loss, and which parameters had a gradient."""
        values, gradients = [], []
        for part in self._micro(batch):
            loss = self._share(self._losses.in_place(self.inner, part))
            check_scalar(self._backend, "inner (the T1 loss)", loss)
            values.append(loss.detach())
            gradients.append(_gradients(loss, self._trainer.params))
        value: Tensor = sum(values[1:], values[0])
        if self._backend.readable(value) and not torch.isfinite(value):
            raise NonFiniteError("T1", self.steps)
        total = _summed(gradients)
        self._trainer.step(total)
        return value, [total[name] is not None for name in sorted(total)]

    def _greedy(self, greedy: Greedy, record: Record, val_batch: Any, start: Snapshot) -> Estimate:
        """T1−T2: the training step itself is the one that is differentiated."""
        losses, rule, opt_state = _Pass(self, live=True), None, ()
        if greedy.response == "update":
            with start.in_force():
                rule, opt_state = self._trainer.formula(self.steps, [record.taken])
        estimator = replace(greedy, update=InPlace(self._trainer, rule, losses.plain))
        state = State(start.params, opt_state, self.steps)
        out = self._estimate(estimator, losses, state, lambda t: record, val_batch)
        self._losses.set_buffers(losses.buffers)
        restore(losses.draws)
        return out

    def _look_back(self, window: Window | None, record: Record, val_batch: Any) -> Estimate:
        """Any other estimator: the steps are over, and are taken again on copies as far as it asks."""
        losses = _Pass(self, live=False)
        if window is None:
            state = State(self._trainer.values(), (), self.steps + 1)
            return self._estimate(self.estimator, losses, state, lambda t: record, val_batch)
        first = self.steps + 1 - len(window.records)
        with window.start.in_force():
            rule, opt_state = self._trainer.formula(first, [taken.taken for taken in window.records])
        estimator = replace(self.estimator, update=Hooked(self._trainer, rule))  # type: ignore[call-arg]
        state = State(window.start.params, opt_state, first)
        out = self._estimate(estimator, losses, state, lambda t: window.records[t - first], val_batch)
        self._check_replay(window.start.params, out.state.params)
        return out

    def _estimate(
        self, estimator: Any, losses: _Pass, state: State, train: Callable[[int], Record], val: Any
    ) -> Estimate:
        problem, lam = Bilevel(losses.inner, losses.outer), self._backend.detach(self._hyper.tensors())
        out: Estimate = estimator.estimate(problem, state, lam, train, lambda t: val, backend=self._backend)
        return out

    def _check_replay(self, start: Tree, again: Tree) -> None:
        """Compare where the replayed steps end with where training is, as far as that can be read."""
        now = self._trainer.values()
        apart, way, size = (
            vectors.norm(self._backend, x)
            for x in (
                vectors.subtract(self._backend, again, now),
                vectors.subtract(self._backend, now, start),
                now,
            )
        )
        if not self._backend.readable(apart):
            return
        eps = torch.finfo(apart.dtype).eps
        if apart > eps**0.5 * way + 100 * eps * size:
            raise ReplayError(
                f"training steps taken again ended {float(apart):.1e} away from where they ended before, "
                f"having gone {float(way):.1e}"
            )

    def _move(self, hypergradient: Tree) -> None:
        self._mover.step(self._named(hypergradient))

    # What a step needs to be taken again, or taken back.

    def _refresh(self) -> None:
        """Look again at what is trained: parameters may have been frozen, freed, added or hooked."""
        params = trained(self.model, self.optimizer)
        if {name: id(p) for name, p in params.items()} != {
            name: id(p) for name, p in self._trainer.params.items()
        }:
            if self._window is not None:
                raise ArgumentError(
                    "ModuleTuner: the parameters that the optimizer trains have changed within the steps "
                    f"that {type(self.estimator).__name__} reaches back over"
                )
            self._trainer = replace(self._trainer, params=params)
        if self.micro_batches > 1 and self._trainer.has_hooks:
            raise UnsupportedOpError(
                "gradient hooks of parameters are called for each micro-batch, and what they do together is "
                "not differentiated: use micro_batches=1, or change gradients in the loss"
            )

    def _named(self, lam: Tree) -> dict[str, Any]:
        """A tree like λ, by path."""
        paths = trees.paths(self._hyper.tensors(), "hparams")
        return dict(zip(paths, trees.flatten(lam)[0], strict=True))

    def _record(self, batch: Any) -> Record:
        return Record(batch, generator(), self._losses.buffers(), self._losses.modes(), self._trainer.now())

    def _window_from_here(self) -> Window | None:
        """The window that the coming step belongs to, if an estimate is going to reach back to it."""
        if not isinstance(self.estimator, Unrolled) or self._window is not None:
            return self._window
        if self.every - self.steps % self.every > self.estimator.training_steps:
            return None
        return Window(Snapshot.take(self._trainer))

    @contextmanager
    def _undone_on_failure(self, record: Record, everything: bool) -> Iterator[Snapshot | None]:
        """Put module, optimiser, λ and generators back if the block fails.

        A step that does not move λ fails, if at all, before the optimiser has moved.
        """
        theta, lam = (Snapshot.take(x) if everything else None for x in (self._trainer, self._mover))
        try:
            yield theta
        except BaseException:
            restore(record.draws)
            self._losses.set_buffers(record.buffers)
            for snapshot in (theta, lam):
                if snapshot is not None:
                    snapshot.restore()
            raise

    def _micro(self, batch: Any) -> Sequence[Any]:
        if self.micro_batches == 1:
            return [batch]
        if not isinstance(batch, Sequence) or len(batch) != self.micro_batches:
            size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
            raise ArgumentError(
                f"ModuleTuner: a training batch is a sequence of micro_batches = {self.micro_batches}, and "
                f"this is a {type(batch).__name__}{size}"
            )
        return batch

    def _share(self, loss: Any) -> Any:
        return loss if self.micro_batches == 1 else loss / self.micro_batches

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit: module, optimisers, λ, generators, and the clock.

        Plain containers of tensors, which ``torch.load(..., weights_only=True)`` reads.
        """
        draws = generator()
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hparams": self._hyper.state(),
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "draws": [draws.cpu, *draws.cuda],
            "window": None if self._window is None else write(self._window),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            CheckpointError: if it belongs to something else; everything is then as it was.
        """
        found = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            self._load(found)
            raise CheckpointError(f"the state belongs to another run or structure: {error}") from error

    def _load(self, state: dict[str, Any]) -> None:
        held = self._hyper.state()
        shapes = [{path: tuple(x.shape) for path, x in h.items()} for h in (state["hparams"], held)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"its hyperparameters have shapes {shapes[0]}, and these {shapes[1]}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])
        with torch.no_grad():
            for path, tensor in held.items():
                tensor.copy_(state["hparams"][path])
        cpu, *cuda = state["draws"]
        restore(Draws(cpu, tuple(cuda)))
        self._window = None if state["window"] is None else read(self._trainer, state["window"])
        self.steps = int(state["steps"])

    # Checks.

    def _checked(self, estimator: HypergradientEstimator) -> HypergradientEstimator:
        if isinstance(estimator, Implicit):
            return estimator
        if not isinstance(estimator, Greedy | Unrolled):
            raise ArgumentError(
                f"ModuleTuner: estimator = {estimator!r}; it is a Greedy, an Unrolled or an Implicit"
            )
        rule = estimator.update
        given = rule.optimizer if isinstance(rule, TorchOptimizer) else rule
        if given is not self.optimizer:
            raise ArgumentError(
                f"ModuleTuner: the module is trained by its optimizer, so {type(estimator).__name__} takes "
                f"that one, not {given!r}"
            )
        if isinstance(estimator, Unrolled) or estimator.response == "update":
            dialect(self.optimizer)
        if isinstance(estimator, Unrolled) and estimator.training_steps > self.every:
            raise ArgumentError(
                f"ModuleTuner: Unrolled(steps={estimator.training_steps}) reaches back over more than "
                f"every = {self.every} steps; λ moves in between"
            )
        return estimator


def _check_tuned(backend: TorchBackend, lam: Tree, hyper_optimizer: Optimizer) -> None:
    if not isinstance(hyper_optimizer, Optimizer):
        raise ArgumentError(
            f"ModuleTuner: hyper_optimizer = {hyper_optimizer!r}; it is a torch.optim optimiser"
        )
    held = {id(h) for group in hyper_optimizer.param_groups for h in group["params"]}
    if not any(id(h) in held for h in backend.flatten(lam)[0]):
        raise ArgumentError("ModuleTuner: hyper_optimizer holds none of hparams, so none would ever move")


def _check_distinct(backend: TorchBackend, lam: Tree, trained: Iterable[Tensor]) -> None:
    """Refuse one tensor in two roles."""
    seen: dict[int, str] = {id(p): "a parameter that the optimizer trains" for p in trained}
    for path, h in zip(backend.paths(lam, "hparams"), backend.flatten(lam)[0], strict=True):
        if id(h) in seen:
            raise ArgumentError(f"ModuleTuner: {path} is also {seen[id(h)]}: give each tensor one place")
        seen[id(h)] = path


def _gradients(loss: Tensor, theta: dict[str, Any], keep: bool = False) -> dict[str, Tensor | None]:
    """First-order gradients, ``None`` where the loss does not depend on a tensor."""
    found = torch.autograd.grad(loss, list(theta.values()), retain_graph=keep, allow_unused=True)
    return dict(zip(theta, found, strict=True))


def _summed(gradients: Sequence[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """Added up one after the other, as ``.grad`` accumulates."""
    total = dict(gradients[0])
    for more in gradients[1:]:
        for name, g in more.items():
            before = total[name]
            total[name] = g if before is None else before if g is None else before + g
    return total


def _variables(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that say, as parameters do, that they require grad: losses may ask."""
    return {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in theta.items()}


def _copies(buffers: Buffers) -> Buffers:
    return {name: buffer.clone() for name, buffer in buffers.items()}
