r"""The interface of estimators: the state that they take and the estimate that they return.

With A_t = ∂Φ/∂z and B_t = ∂Φ/∂λ at training step t, and v = ∂_θ C2 at the last state, every estimator
is a choice of which terms of one sum to keep:

    dC2/dλ = ∂_λ C2 + Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) v
             direct    response
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree, find_backend
from hypergrad.backend.arguments import check_same, check_variables
from hypergrad.backend.finite import first_nonfinite
from hypergrad.backend.shown import shown
from hypergrad.errors import ArgumentError, NonFiniteError
from hypergrad.estimators.report import Report
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches


class State(NamedTuple):
    """The state of training, as a tree of arrays.

    ``step`` counts training steps; it is passed to schedules and to functions t -> batch. ``memory`` is what
    an estimator keeps from one estimate to the next, if anything; ``aux`` is the auxiliary state of losses
    that have one, see `hypergrad.Bilevel`.
    """

    params: Tree
    opt_state: Tree = None
    step: Any = 0
    memory: Tree = None
    aux: Tree = None

    def __repr__(self) -> str:
        return shown(self)


H = TypeVar("H")
"""The tree of hyperparameters, and of hypergradients."""


class Estimate(NamedTuple, Generic[H]):
    """A hypergradient, and the state from which training continues."""

    hypergradient: H
    """dC2/dλ, with the structure, shapes and dtypes of the hyperparameters."""
    state: State
    """The state from which training continues; nothing in it has to be recomputed."""
    inner_value: Scalar
    """C̃1 at the last training step."""
    outer_value: Scalar
    """C2 where ∂_θ C2 was taken."""
    report: Report

    def readable(self, backend: Backend) -> bool:
        """Return whether all that `HypergradientEstimator.check` reads can be read now.

        Under ``jax.vmap`` some numbers may be mapped over, and others not.
        """
        return backend.readable(
            *backend.flatten((self.hypergradient, self.inner_value, self.outer_value, self.report))[0]
        )

    def __repr__(self) -> str:
        return shown(self)


@dataclass(frozen=True)
class HypergradientEstimator(ABC):
    """A published method of estimating dC2/dλ.

    An estimator is a value: frozen, comparable, printable. Its methods are pure: they do not change their
    arguments, and the same arguments give the same estimate. To write one, implement `_init` and
    `_estimate`; this class checks the arguments and the results.
    """

    _: KW_ONLY
    by_hand: ClassVar[bool] = False
    """Does it accept problems that are given by their derivatives?"""
    at_saddles: ClassVar[bool] = False
    """Does it work where the inner problem is a saddle, which training does not reach?"""
    allow_unused: bool = False
    """Return zeros for a hyperparameter that neither loss uses, instead of raising `DisconnectedError`, and
    for one without effect on ∇C̃1, instead of giving a `ZeroResponseWarning`."""

    @property
    @abstractmethod
    def training_steps(self) -> int:
        """The number of training steps in one estimate."""

    @property
    def is_exact(self) -> bool:
        """Is the estimate the whole derivative of its own training steps, from a constant start?"""
        return False

    def init(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        *,
        aux: Tree = None,
        backend: Backend | str | None = None,
    ) -> State:
        """Return the state before the first training step.

        Args:
            problem: the two losses.
            params: θ_0.
            hparams: λ.
            aux: the initial auxiliary state, for losses that have one.
            backend: found from the arrays if it is not given.

        Raises:
            ArgumentError, LeafTypeError, UnsupportedLeafError: as for `estimate`; the first also if ``aux``
                is given to losses without an auxiliary state, or not to those with one.
        """
        backend = find_backend(params, hparams, backend=backend)
        check_variables(backend, params=params, hparams=hparams)
        self._check_problem(problem)
        if problem.has_aux == (aux is None):
            raise ArgumentError(
                "the losses have an auxiliary state: pass its initial value as aux="
                if problem.has_aux
                else "aux= is given, but the losses have no auxiliary state: use Bilevel(…, has_aux=True)"
            )
        state = self._init(backend, backend.constants(params))._replace(aux=backend.constants(aux))
        return state._replace(memory=self._memory(backend, state, backend.constants(hparams)))

    def estimate(
        self,
        problem: Problem,
        state: State,
        hparams: H,
        train: Batches,
        val: Batches,
        *,
        backend: Backend | str | None = None,
    ) -> Estimate[H]:
        """Estimate dC2/dλ, taking the estimator's `training_steps`.

        Args:
            problem: the two losses.
            state: from `init`, or from the last estimate.
            hparams: λ, any tree of floating-point arrays.
            train: batches of T1; see `hypergrad.problems.batches`.
            val: a batch of T2.
            backend: found from the arrays if it is not given.

        Raises:
            ArgumentError: empty trees, a loss that is not scalar, too few batches, wrong structures.
            LeafTypeError: integer, boolean or foreign leaves; mixed devices; a loss that is wider than the
                parameters.
            UnsupportedLeafError: complex leaves.
            DisconnectedError: a hyperparameter that neither loss uses; a loss that uses no parameter.
            NonFiniteError: a NaN or an infinity in a loss or a derivative.
            SolveError, InnerNotConvergedError: `Implicit` only.

        Where values cannot be read (in a compiled program, or on a device that would have to be waited for),
        `NonFiniteError`, `SolveError` and `InnerNotConvergedError` are not raised here. The hypergradient is
        then NaN, and the report has the reason: call `check` later.

        In several threads, estimates whose losses draw run one after the other, since the generators are the
        process's. What your own threads draw meanwhile is not kept apart.
        """
        backend = find_backend(state.params, hparams, backend=backend)
        check_variables(backend, params=state.params, hparams=hparams)
        self._check_problem(problem)
        state, hparams = backend.constants((state, hparams))
        with backend.random.turn(problem), backend.estimating():
            out = self._estimate(backend, problem, state, hparams, train, val)
            check_same(backend, type(self).__name__, out.hypergradient, "hparams", hparams)
            if out.readable(backend):
                return self.check(out, backend=backend)
            return out._replace(hypergradient=self.withheld(backend, out, out.hypergradient))

    def withheld(self, backend: Backend, out: Estimate[Any], result: Tree) -> Tree:
        """Return a result of the estimate, or NaN in its place if the estimate is not `sound`.

        A fault that cannot be raised now must not pass for a number. Values that can be read have been
        checked.
        """
        sound, where = self.sound(out, backend=backend), backend.xp.where
        return result if sound is True else backend.map(lambda x: where(sound, x, float("nan")), result)

    def check(self, out: Estimate[H], *, backend: Backend | str | None = None) -> Estimate[H]:
        """Raise an error if the estimate's report carries a fault; otherwise return the estimate.

        Raises:
            ArgumentError: if ``out`` is several estimates, mapped over by ``jax.vmap``.
            NonFiniteError: a NaN or an infinity in a loss or a derivative.
            SolveError, InnerNotConvergedError: `Implicit` only.
        """
        backend = find_backend(out.hypergradient, backend=backend)
        if shape := np.shape(out.outer_value):
            raise ArgumentError(
                f"check takes one estimate, but these are {shape[0]}, mapped over: check each of them, "
                "jax.tree.map(lambda leaf: leaf[k], out)"
            )
        self._check_losses(backend, out)
        # An estimate that is not sound may be NaN for that reason alone: then its terms were finite.
        if not all(
            np.isfinite(backend.to_numpy(x)) for x in (out.report.direct_norm, out.report.response_norm)
        ):
            self._check_finite(backend, out)
        self.check_report(backend, out.report)
        self._check(backend, out)
        self._check_finite(backend, out)
        return out

    def check_report(self, backend: Backend, report: Report) -> None:  # noqa: B027
        """Raise the faults, and give the warnings, that the estimator sees in the report alone.

        `check` calls it. The report of a row of a history, `Report.from_columns`, is enough for it.
        """

    def remarkable(self, columns: dict[str, Any]) -> Any:
        """Return for each row of a history's reports whether `check_report` has something new to say.

        A boolean NumPy array, which marks the first row of each kind of warning: a run gives each once. It is
        computed from all rows together, since a compiled run takes microseconds for each.
        """
        return np.zeros(len(columns["gradients"]), bool)

    def sound(self, out: Estimate[Any], *, backend: Backend | str | None = None) -> Any:
        """Return whether `check` would pass, as a boolean array that a compiled loop can branch on."""
        backend = find_backend(out.hypergradient, backend=backend)
        faults, isfinite = out.report.faults, backend.xp.isfinite
        finite = (faults.step < 0) & isfinite(out.outer_value) & (faults.outer_leaf < 0)
        return finite & (first_nonfinite(backend, out.hypergradient) < 0) & self._sound(backend, out)

    @abstractmethod
    def _init(self, backend: Backend, params: Tree) -> State: ...

    @abstractmethod
    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate[Any]: ...

    def _check_problem(self, problem: Problem) -> None:
        if problem.by_hand and not self.by_hand:
            raise ArgumentError(
                f"{type(self).__name__} differentiates through training, but hg.Derivatives holds first and "
                "second derivatives at one point: use Implicit or Greedy"
            )
        if not problem.definite and not self.at_saddles:
            raise ArgumentError(
                f"{type(self).__name__} trains, but a level above another is a saddle, which training does "
                "not reach: solve the levels, and use Implicit(hg.MINRES())"
            )

    def _memory(self, backend: Backend, state: State, hparams: Tree) -> Tree:
        """Return the memory before the first estimate."""
        return state.memory

    @property
    def needs_every_step(self) -> bool:
        """Must it take part in every training step?"""
        return False

    @property
    def resamples(self) -> bool:
        """Does an estimate use batches of T1 beyond those of its training steps?"""
        return False

    def restarted(self, fresh: State, last: State) -> State:
        """Return the state from which training restarts, after a run that ended in the state ``last``."""
        return fresh

    def _check(self, backend: Backend, out: Estimate[Any]) -> None:  # noqa: B027
        """Raise an error for faults that only this estimator has, beyond `check_report`; most have none."""

    def _sound(self, backend: Backend, out: Estimate[Any]) -> Any:
        """Return whether `check_report` and `_check` would pass."""
        return True

    def _check_losses(self, backend: Backend, out: Estimate[Any]) -> None:
        """Raise an error if a loss or its gradient by the parameters was not finite."""
        # Read one number at a time, as needed: a JAX operation outside of a program costs ten times as much.
        report, read = out.report, backend.to_numpy
        faults = report.faults

        def step() -> int:
            return int(read(out.state.step))

        if (bad_step := int(read(faults.step))) >= 0:
            leaf = int(read(faults.leaf))
            path = None if leaf < 0 else backend.paths(out.state.params, "params")[leaf]
            raise NonFiniteError("T1", bad_step, path)
        if not np.isfinite(read(out.outer_value)):
            raise NonFiniteError("T2", step())
        if (leaf := int(read(faults.outer_leaf))) >= 0:
            raise NonFiniteError("T2", step(), backend.paths(out.state.params, "params")[leaf])

    def _check_finite(self, backend: Backend, out: Estimate[Any]) -> None:
        """Raise an error if the hypergradient is not finite, though the losses were."""
        read, report = backend.to_numpy, out.report
        if (leaf := int(read(first_nonfinite(backend, out.hypergradient)))) >= 0:
            path = backend.paths(out.hypergradient, "hparams")[leaf]
            step = int(read(out.state.step))
            if not np.isfinite(read(report.direct_norm)):
                raise NonFiniteError("T2", step, path)
            raise NonFiniteError("T1", max(step - 1, 0), path)


def hypergradient(
    problem: Problem,
    params: Tree,
    hparams: H,
    train: Batches,
    val: Batches,
    estimator: HypergradientEstimator,
    *,
    aux: Tree = None,
    differentiable: bool = False,
    backend: Backend | str | None = None,
) -> H:
    """Return dC2/dλ at these parameters, by one call of ``estimator.init`` and one of ``estimator.estimate``.

    Arguments and errors are those of both methods. Where an estimate has a fault that cannot be raised, as in
    a compiled program, the result is NaN; ``estimator.estimate`` returns the report with the reason.

    Set ``differentiable`` to take derivatives of the hypergradient: it keeps the result attached to the
    arguments in frameworks that need to be told, like torch's ``create_graph``.
    """
    backend = find_backend(params, hparams, backend=backend)
    with backend.recorded() if differentiable else nullcontext():
        state = estimator.init(problem, params, hparams, aux=aux, backend=backend)
        return estimator.estimate(problem, state, hparams, train, val, backend=backend).hypergradient
