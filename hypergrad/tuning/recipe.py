"""What is tuned, by which estimator, in which coordinates and how often: what all tuners share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError, NonFiniteError
from hypergrad.estimators import Estimate, HypergradientEstimator
from hypergrad.estimators.report import Report
from hypergrad.problems.base import Problem
from hypergrad.problems.step import Observation
from hypergrad.tuning import spaces
from hypergrad.tuning.history import History, Row
from hypergrad.tuning.spaces import Real, Spaces
from hypergrad.tuning.state import Step, TunerState
from hypergrad.updates import Adam, UpdateRule, Updates, as_update_rule


class Updated(NamedTuple):
    """λ after an update, in free coordinates and in its own domain.

    ``clipped`` counts the entries that a projection put back into their space.
    """

    free: Tree
    hyper_state: Tree
    hparams: Tree
    clipped: Any


@final
@dataclass(frozen=True)
class Recipe:
    r"""How θ and λ are trained in one run, without saying where the state is kept.

        θ ← Φ(θ, λ, T1 batch)            every step; no validation pass
        u ← u − hyper_update(dC2/du)     once in every ``every`` steps, dC2/du = (∂λ/∂u)ᵀ dC2/dλ

    `Tuner` runs a recipe as a pure function of a state, ``hypergrad_torch.ModuleTuner`` in place on a
    module. Both take these fields as their arguments.

    Args:
        problem: the two losses.
        estimator: any `HypergradientEstimator`.
        space: a space such as `hypergrad.Positive`, or a tree of them with the structure of λ.
        hyper_update: the update rule of λ, in free coordinates u; its rates are numbers.
        every: training steps for each update of λ, T at least for an estimator that takes T steps.
        update: trains θ where the estimator does not.
        restart: begin every estimate's training steps at θ_0 again.

    Raises:
        ArgumentError: if ``every`` is not a positive integer, if the update rule for θ is missing or given
            twice, if the estimator does not train and ``restart`` is true, if `Forward` would miss training
            steps, or if the inner level of the problem is a saddle.
    """

    problem: Problem
    estimator: HypergradientEstimator
    space: Spaces = field(default_factory=Real)
    hyper_update: Updates = field(default_factory=lambda: Adam(1e-2))
    every: int = 10
    update: Updates | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        as_update_rule(self.hyper_update)
        check_count("every", self.every)
        name = type(self.estimator).__name__
        if self.trains and self.update is not None:
            raise ArgumentError(f"{name} trains θ by its own update rule; leave update= out")
        if not self.trains and self.update is None:
            raise ArgumentError(f"{name} does not train θ; pass update=, such as hg.Adam(1e-3)")
        if self.estimator.needs_every_step and self.plain_steps:
            raise ArgumentError(
                f"{name} must propagate its tangents through every step, and would miss {self.plain_steps} "
                f"of every = {self.every} steps: pass steps={self.every}"
            )
        if not self.problem.definite:
            raise ArgumentError("the inner level of the problem is a saddle, which training cannot reach")
        if not self.trains and self.restart:
            raise ArgumentError(f"restart=True restarts an unroll, and {name} does not unroll")

    # The schedule of steps.

    @cached_property
    def trains(self) -> bool:
        """Whether the estimator takes training steps."""
        return self.estimator.training_steps > 0

    @property
    def rule(self) -> UpdateRule:
        """The update rule that trains θ."""
        update: Any = getattr(self.estimator, "update", None) if self.trains else self.update
        return as_update_rule(update)

    @cached_property
    def closing_steps(self) -> int:
        """Training steps that are taken together with an update of λ."""
        return max(1, self.estimator.training_steps)

    @cached_property
    def plain_steps(self) -> int:
        """Training steps between an update of λ and the next closing steps."""
        return max(self.every, self.closing_steps) - self.closing_steps

    @cached_property
    def period(self) -> int:
        """Training steps from one update of λ to the next."""
        return self.plain_steps + self.closing_steps

    # The state, and coordinates of λ.

    def init(self, backend: Backend, params: Tree, hparams: Tree, aux: Tree) -> TunerState:
        """Return the state before the first step.

        Raises:
            ArgumentError: if a hyperparameter lies outside its space, and as for any estimate.
        """
        inner = self.estimator.init(self.problem, params, hparams, aux=aux, backend=backend)
        if not self.trains:
            inner = inner._replace(opt_state=self.rule.init(backend, params))
        free = self.free(backend, hparams)
        hyper_state = as_update_rule(self.hyper_update).init(backend, free)
        return TunerState(inner, free, hyper_state, 0, 0, inner if self.restart else None)

    def hparams(self, backend: Backend, free: Tree) -> Tree:
        """Return λ for free coordinates."""
        return spaces.constrain(backend, spaces.spread(backend, self.space, free), free)

    def free(self, backend: Backend, hparams: Tree) -> Tree:
        """Return free coordinates for λ.

        Raises:
            ArgumentError: if a hyperparameter lies outside its space, or the spaces do not fit.
        """
        return spaces.unconstrain(backend, spaces.spread(backend, self.space, hparams), hparams)

    # The update of λ.

    def update_hparams(
        self,
        backend: Backend,
        free: Tree,
        hyper_state: Tree,
        hypergradient: Tree,
        updates: Any,
        allowed: Any,
    ) -> Updated:
        """Update λ once: apply the chain rule into free coordinates, the update rule, and the projection.

        ``updates`` counts the updates so far. If ``allowed``, a boolean array or True, is false, λ and the
        state of its rule do not change.
        """
        tree = spaces.spread(backend, self.space, free)
        gradient = spaces.chain(backend, tree, free, hypergradient)
        rule = as_update_rule(self.hyper_update)
        new_free, new_state = rule.update(backend, gradient, hyper_state, free, (), updates)
        projected, clipped = spaces.project(backend, tree, new_free)
        if allowed is not True:

            def choose(new: Any, old: Any) -> Any:
                return backend.xp.where(allowed, new, old)

            projected, new_state = backend.map(choose, (projected, new_state), (free, hyper_state))
        return Updated(projected, new_state, spaces.constrain(backend, tree, projected), clipped)

    def allows(self, backend: Backend, out: Estimate[Any], observed: Observation) -> Any:
        """Return whether this estimate may update λ: True, or a boolean array if values cannot be read.

        If they can, the estimate has been checked already, and any fault was raised.
        """
        if out.readable(backend):
            return True
        return self.estimator.sound(out, backend=backend) & (observed.bad_step < 0)

    def check_can_tune(self) -> None:
        """Check that an estimate can be made at the present θ.

        Raises:
            ArgumentError: for an estimator that needs several training steps, or all of them.
        """
        steps, name = self.estimator.training_steps, type(self.estimator).__name__
        if steps > 1 or self.estimator.needs_every_step:
            needs = "every training step" if self.estimator.needs_every_step else f"{steps} training steps"
            raise ArgumentError(
                f"tune takes no training steps, and {name} differentiates through {needs}: use hg.Greedy or "
                "hg.Implicit, or let the tuner train: call step"
            )

    # Faults and the record of a step.

    def check(self, backend: Backend, params: Tree, step: Step) -> None:
        """Raise the faults of a step.

        Raises:
            As `HypergradientEstimator.check`.
        """
        if (bad := int(step.observed.bad_step)) >= 0:
            leaf = int(step.observed.bad_leaf)
            path = None if leaf < 0 else backend.paths(params, "params")[leaf]
            raise NonFiniteError("T1", bad, path)
        if step.estimate is not None and bool(step.updated):
            self.estimator.check(step.estimate, backend=backend)

    def check_rows(self, backend: Backend, history: History, first: int) -> None:
        """Give the warnings that rows of a history call for, from the row ``first`` on.

        For runs that were one program. Rounds with a fault end such a run, and so does a fault in `check`.
        """
        rows = {name: column[first:] for name, column in history.reports.items()}
        for k in self.estimator.remarkable(rows).nonzero()[0]:
            columns = {name: column[k] for name, column in rows.items()}
            self.estimator.check_report(backend, Report.from_columns(columns))

    def row(self, backend: Backend, step: Step, gradients: Any) -> Row:
        """Return an update's row; ``gradients`` were spent on training alone since the last update."""
        out = step.estimate
        assert out is not None
        return Row.of(backend, step.hparams, out, step.clipped, out.report.cost + gradients)

    def training_gradients(self, step: Step) -> int:
        """Return the training gradients that the estimate of a step, if any, does not count."""
        return 0 if step.updated and self.trains else int(step.trained)


def check_count(name: str, value: Any) -> None:
    """Check a number of steps or of batches.

    Raises:
        ArgumentError: if it is not a positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} = {value!r}; it must be a positive integer")
