"""What is tuned, by which estimator, in which coordinates and how often: all that tuners have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError, NonFiniteError
from hypergrad.estimators import Estimate, HypergradientEstimator
from hypergrad.problems.base import Problem
from hypergrad.problems.step import Observation
from hypergrad.tuning import spaces
from hypergrad.tuning.history import Row
from hypergrad.tuning.spaces import Real, Spaces
from hypergrad.tuning.state import Step, TunerState
from hypergrad.updates import Adam, UpdateRule, Updates, as_update_rule


class Updated(NamedTuple):
    """λ after an update, in free coordinates and in its own domain.

    ``clipped`` counts the entries that were moved back into their space.
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
        ArgumentError: if ``every`` is no positive integer, if the update rule for θ is missing or given
            twice, if ``restart`` is asked of an estimator that does not train, if `Forward` would not see
            every step, and for a problem whose inner level is a saddle.
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
                f"{name} carries its tangents through every step, and of every = {self.every} steps it would "
                f"miss {self.plain_steps}: take steps={self.every}"
            )
        if not self.problem.definite:
            raise ArgumentError("the inner level of the problem is a saddle, to which no training leads")
        if not self.trains and self.restart:
            raise ArgumentError(f"restart=True begins an unroll again, and {name} unrolls nothing")

    # The rhythm.

    @cached_property
    def trains(self) -> bool:
        """Does the estimator take training steps?"""
        return self.estimator.training_steps > 0

    @property
    def rule(self) -> UpdateRule:
        """The update rule that trains θ."""
        update: Any = getattr(self.estimator, "update", None) if self.trains else self.update
        return as_update_rule(update)

    @cached_property
    def closing_steps(self) -> int:
        """Training steps that come with an update of λ."""
        return max(1, self.estimator.training_steps)

    @cached_property
    def plain_steps(self) -> int:
        """Training steps before these."""
        return max(self.every, self.closing_steps) - self.closing_steps

    @cached_property
    def period(self) -> int:
        """Training steps from one update of λ to the next."""
        return self.plain_steps + self.closing_steps

    # The state, and coordinates of λ.

    def init(self, backend: Backend, params: Tree, hparams: Tree, aux: Tree) -> TunerState:
        """The state before the first step.

        Raises:
            ArgumentError: if a hyperparameter lies outside of its space, and as for any estimate.
        """
        inner = self.estimator.init(self.problem, params, hparams, aux=aux, backend=backend)
        if not self.trains:
            inner = inner._replace(opt_state=self.rule.init(backend, params))
        free = self.free(backend, hparams)
        hyper_state = as_update_rule(self.hyper_update).init(backend, free)
        return TunerState(inner, free, hyper_state, 0, 0, inner if self.restart else None)

    def hparams(self, backend: Backend, free: Tree) -> Tree:
        """λ for free coordinates."""
        return spaces.constrain(backend, spaces.spread(backend, self.space, free), free)

    def free(self, backend: Backend, hparams: Tree) -> Tree:
        """Free coordinates for λ.

        Raises:
            ArgumentError: if a hyperparameter lies outside of its space, or the spaces do not fit.
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
        """One update: the chain rule into free coordinates, the update rule, the projection.

        ``updates`` counts those before. Where ``allowed``, a boolean array or True, is false, λ and the
        state of its rule stay as they were.
        """
        tree = spaces.spread(backend, self.space, free)
        slope = spaces.chain(backend, tree, free, hypergradient)
        rule = as_update_rule(self.hyper_update)
        moved, new_state = rule.update(backend, slope, hyper_state, free, (), updates)
        projected, clipped = spaces.project(backend, tree, moved)
        if allowed is not True:

            def choose(new: Any, old: Any) -> Any:
                return backend.xp.where(allowed, new, old)

            projected, new_state = backend.map(choose, (projected, new_state), (free, hyper_state))
        return Updated(projected, new_state, spaces.constrain(backend, tree, projected), clipped)

    def allows(self, backend: Backend, out: Estimate[Any], observed: Observation) -> Any:
        """May λ be updated by this estimate? True, or a boolean array where no value can be read.

        Where values can be read the estimate has been checked, and a fault was raised.
        """
        if backend.readable(out.outer_value):
            return True
        return self.estimator.sound(out, backend=backend) & (observed.bad_step < 0)

    def check_tunes(self) -> None:
        """Check that an estimate can be made where θ stands.

        Raises:
            ArgumentError: for an estimator that needs several training steps, or all of them.
        """
        steps, name = self.estimator.training_steps, type(self.estimator).__name__
        if steps > 1 or self.estimator.needs_every_step:
            needs = "every training step" if self.estimator.needs_every_step else f"{steps} training steps"
            raise ArgumentError(
                f"tune takes no training steps, and {name} differentiates through {needs}: take hg.Greedy or "
                "hg.Implicit, or let the tuner train, by step"
            )

    # What is said of a step.

    def check(self, backend: Backend, params: Tree, step: Step) -> None:
        """Raise what a step has to report.

        Raises:
            As `HypergradientEstimator.check`.
        """
        if (bad := int(step.observed.bad_step)) >= 0:
            leaf = int(step.observed.bad_leaf)
            path = None if leaf < 0 else backend.paths(params, "params")[leaf]
            raise NonFiniteError("T1", bad, path)
        if step.estimate is not None and bool(step.updated):
            self.estimator.check(step.estimate, backend=backend)

    def row(self, backend: Backend, step: Step, gradients: Any) -> Row:
        """The row of history for an update, with the gradients spent on training alone since the last one."""
        out = step.estimate
        assert out is not None
        return Row.of(backend, step.hparams, out, step.clipped, out.report.cost + gradients)

    def training_gradients(self, step: Step) -> int:
        """Gradients of a step's own training that its estimate does not count; one that trains counts all."""
        return 0 if step.updated and self.trains else int(step.trained)


def check_count(name: str, value: Any) -> None:
    """Check a number of steps or of batches.

    Raises:
        ArgumentError: if it is no positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} = {value!r}; it is a positive integer")
