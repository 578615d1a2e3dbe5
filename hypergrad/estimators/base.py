r"""What an estimator is, what it takes and what it returns.

With A_t = ∂Φ/∂z and B_t = ∂Φ/∂λ at training step t, and v = ∂_θ C2 at the last state, every estimator
is a choice of which terms of one sum to keep:

    dC2/dλ = ∂_λ C2 + Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) v
             direct    response
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree, find_backend, vectors
from hypergrad.backend.arguments import check_same, check_variables
from hypergrad.backend.finite import first_nonfinite
from hypergrad.errors import ArgumentError, DisconnectedError, NonFiniteError, explain
from hypergrad.estimators.report import Faults, Report, SolveReport, TapeReport
from hypergrad.problems.base import Problem, Validation
from hypergrad.problems.batches import Batches
from hypergrad.problems.condition import Spent
from hypergrad.problems.step import Inner
from hypergrad.updates import UpdateRule


class State(NamedTuple):
    """Where training stands: a tree that every framework knows how to carry.

    ``step`` counts training steps; a function of batches is called with it, and a schedule too.
    ``memory`` is what an estimator carries from one estimate to the next, if anything; ``aux`` is the
    auxiliary state of losses that have one, see `hypergrad.Bilevel`.
    """

    params: Tree
    opt_state: Tree = None
    step: Any = 0
    memory: Tree = None
    aux: Tree = None


class Estimate(NamedTuple):
    """A hypergradient, and the state from which training goes on."""

    hypergradient: Tree
    """dC2/dλ, with the structure, shapes and dtypes of the hyperparameters."""
    state: State
    """Training goes on from here; nothing of it need be computed again."""
    inner_value: Scalar
    """C̃1 at the last training step."""
    outer_value: Scalar
    """C2 where ∂_θ C2 was taken."""
    report: Report


@dataclass(frozen=True)
class HypergradientEstimator(ABC):
    """A published way to estimate dC2/dλ.

    An estimator is a value: frozen, comparable, printable. Its work is pure: what it is given is left as
    it was, and the same arguments give the same estimate. To write one, implement `_init` and
    `_estimate`; the checks before and after are done here, for all.
    """

    _: KW_ONLY
    by_hand: ClassVar[bool] = False
    """Does it serve problems that are given by their derivatives?"""
    at_saddles: ClassVar[bool] = False
    """Does it make sense where the inner problem is a saddle, to which no training leads?"""
    allow_unused: bool = False
    """Give zeros for a hyperparameter that neither loss uses, instead of a `DisconnectedError`."""

    @property
    @abstractmethod
    def training_steps(self) -> int:
        """How many training steps one estimate takes."""

    def init(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        *,
        aux: Tree = None,
        backend: Backend | str | None = None,
    ) -> State:
        """The state before the first training step.

        Args:
            problem: the two losses.
            params: θ_0.
            hparams: λ.
            aux: the auxiliary state with which losses that have one begin.
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
                "the losses have an auxiliary state: pass the one to begin with as aux="
                if problem.has_aux
                else "aux= is given, and the losses have no auxiliary state: say Bilevel(…, has_aux=True)"
            )
        state = self._init(backend, backend.constants(params))._replace(aux=backend.constants(aux))
        return state._replace(memory=self._memory(backend, state, backend.constants(hparams)))

    def estimate(
        self,
        problem: Problem,
        state: State,
        hparams: Tree,
        train: Batches,
        val: Batches,
        *,
        backend: Backend | str | None = None,
    ) -> Estimate:
        """Estimate dC2/dλ, training as far as the estimator's definition asks for.

        Args:
            problem: the two losses.
            state: from `init`, or from the last estimate.
            hparams: λ, any tree of floating-point arrays.
            train: batches of T1; see `hypergrad.problems.batches`.
            val: a batch of T2.
            backend: found from the arrays if it is not given.

        Raises:
            ArgumentError: empty trees, a loss that is not scalar, too few batches, wrong structures.
            LeafTypeError: integer, boolean or foreign leaves; mixed dtypes or devices.
            UnsupportedLeafError: complex leaves.
            DisconnectedError: a hyperparameter that neither loss uses; a loss that uses no parameter.
            NonFiniteError: a NaN or an infinity in a loss or a derivative.
            SolveError, InnerNotConvergedError: `Implicit` only.

        Where values cannot be read (under a compiler, or on a device that would have to be waited for)
        the last three kinds are not raised here but by `check`, once they can.
        """
        backend = find_backend(state.params, hparams, backend=backend)
        check_variables(backend, params=state.params, hparams=hparams)
        self._check_problem(problem)
        state, hparams = backend.constants((state, hparams))
        with backend.random.undone_on_failure():
            out = self._estimate(backend, problem, state, hparams, train, val)
            check_same(backend, type(self).__name__, out.hypergradient, "hparams", hparams)
            if backend.readable(out.outer_value, *backend.flatten(out.hypergradient)[0]):
                self.check(out, backend=backend)
        return out

    def check(self, out: Estimate, *, backend: Backend | str | None = None) -> Estimate:
        """Raise what an estimate has to report, and return it if there is nothing.

        Raises:
            ArgumentError: if these are several, of ``jax.vmap``.
            NonFiniteError: a NaN or an infinity in a loss or a derivative.
            SolveError, InnerNotConvergedError: `Implicit` only.
        """
        backend = find_backend(out.hypergradient, backend=backend)
        if shape := np.shape(out.outer_value):
            raise ArgumentError(
                f"check takes one estimate, and these are {shape[0]}, mapped over: check each of them, "
                "jax.tree.map(lambda leaf: leaf[k], out)"
            )
        self._check_finite(backend, out)
        self._check(backend, out)
        return out

    def sound(self, out: Estimate, *, backend: Backend | str | None = None) -> Any:
        """Would `check` pass? A boolean array, on which a compiled loop can act without reading it."""
        backend = find_backend(out.hypergradient, backend=backend)
        faults, isfinite = out.report.faults, backend.xp.isfinite
        finite = (faults.step < 0) & isfinite(out.outer_value) & (faults.outer_leaf < 0)
        return finite & (first_nonfinite(backend, out.hypergradient) < 0) & self._sound(backend, out)

    @abstractmethod
    def _init(self, backend: Backend, params: Tree) -> State: ...

    @abstractmethod
    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate: ...

    def _check_problem(self, problem: Problem) -> None:
        if problem.by_hand and not self.by_hand:
            raise ArgumentError(
                f"{type(self).__name__} differentiates through training, and hg.Derivatives are first and "
                "second derivatives at one point: take Implicit or Greedy"
            )
        if not problem.definite and not self.at_saddles:
            raise ArgumentError(
                f"{type(self).__name__} trains, and a level above another is a saddle, to which no training "
                "leads: solve the levels, and take Implicit(hg.MINRES())"
            )

    def _memory(self, backend: Backend, state: State, hparams: Tree) -> Tree:
        """What is carried from one estimate to the next, before the first."""
        return state.memory

    @property
    def needs_every_step(self) -> bool:
        """Does it have to take part in every step of training?"""
        return False

    @property
    def resamples(self) -> bool:
        """Does an estimate take batches of T1 beyond those of its training steps?"""
        return False

    def restarted(self, fresh: State, last: State) -> State:
        """The state from which training begins once more, after a run that ended in another."""
        return fresh

    def _check(self, backend: Backend, out: Estimate) -> None:  # noqa: B027
        """Raise what is this estimator's own; most have nothing."""

    def _sound(self, backend: Backend, out: Estimate) -> Any:
        """Would `_check` raise nothing?"""
        return True

    def _check_finite(self, backend: Backend, out: Estimate) -> None:
        # Host numbers, one by one as they are looked at: an operation of JAX outside of a program costs ten.
        report, read = out.report, backend.to_numpy
        faults = report.faults

        def at() -> int:
            return int(read(out.state.step))

        if (bad := int(read(faults.step))) >= 0:
            leaf = int(read(faults.leaf))
            path = None if leaf < 0 else backend.paths(out.state.params, "params")[leaf]
            raise NonFiniteError("T1", bad, path)
        if not np.isfinite(read(out.outer_value)):
            raise NonFiniteError("T2", at())
        if (leaf := int(read(faults.outer_leaf))) >= 0:
            raise NonFiniteError("T2", at(), backend.paths(out.state.params, "params")[leaf])
        if (leaf := int(read(first_nonfinite(backend, out.hypergradient)))) >= 0:
            path = backend.paths(out.hypergradient, "hparams")[leaf]
            if not np.isfinite(read(report.direct_norm)):
                raise NonFiniteError("T2", at(), path)
            raise NonFiniteError("T1", max(at() - 1, 0), path)


def hypergradient(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    train: Batches,
    val: Batches,
    estimator: HypergradientEstimator,
    *,
    aux: Tree = None,
    differentiable: bool = False,
    backend: Backend | str | None = None,
) -> Tree:
    """dC2/dλ from these parameters, in one call: ``estimator.init``, then ``estimator.estimate``.

    Arguments and errors as for these. With ``differentiable`` the result stays attached to the arrays given,
    where a framework has to be told (torch's ``create_graph``): for derivatives of the hypergradient.
    """
    backend = find_backend(params, hparams, backend=backend)
    with backend.recorded() if differentiable else nullcontext():
        state = estimator.init(problem, params, hparams, aux=aux, backend=backend)
        return estimator.estimate(problem, state, hparams, train, val, backend=backend).hypergradient


_NO_FAULTS = Faults()


def assemble(
    backend: Backend,
    validation: Validation,
    response: Tree,
    reached: Tree,
    inner_value: Scalar,
    inner_gradient_norm: Scalar,
    state: State,
    spent: Spent,
    unused: Callable[[], Tree] | None,
    faults: Faults = _NO_FAULTS,
    solve: SolveReport | None = None,
    tape: TapeReport | None = None,
    difference_error: Scalar | None = None,
) -> Estimate:
    """Add the direct to the response term, and report both.

    ``unused`` evaluates, only if it has to, whether C̃1 itself reaches each hyperparameter: one that is
    merely added to C̃1 has no response and is still used. ``None`` allows unused ones.

    Raises:
        DisconnectedError: for a hyperparameter that neither loss uses.
    """
    if unused is not None:
        _check_connected(backend, validation.reached, reached, unused)
    held = spent.bytes_held
    if isinstance(held, int) and held >= 2**31:
        held = float(held)  # an integer of 32 bits, where that is what a program has
    direct, constant = backend.detach((validation.direct, response))
    return Estimate(
        vectors.add(backend, validation.direct, response),
        state,
        inner_value,
        validation.value,
        Report(
            inner_gradient_norm,
            vectors.norm(backend, direct),
            vectors.norm(backend, constant),
            reached,
            spent.gradients,
            spent.products,
            held,
            faults._replace(outer_leaf=validation.bad_leaf),
            solve,
            tape,
            difference_error,
        ),
    )


def inner_reaches(
    backend: Backend, problem: Problem, z: Inner, hparams: Tree, first: Callable[[], Tree]
) -> Callable[[], Tree]:
    """A function that says which hyperparameters C̃1 uses, at the price of one evaluation."""

    def reached() -> Tree:
        draws, batch = backend.random.state(), first()
        used = problem.reached(backend, z.params, hparams, batch, z.aux)
        backend.random.restore(draws)
        return used

    return reached


def _check_connected(backend: Backend, direct: Tree, reached: Tree, inner: Callable[[], Tree]) -> None:
    flags = zip(backend.flatten(direct)[0], backend.flatten(reached)[0], strict=True)
    silent = [i for i, (outer, update) in enumerate(flags) if not (outer or update)]
    if not silent:
        return
    used = backend.flatten(inner())[0]
    paths = backend.paths(direct, "hparams")
    for i in silent:
        if not used[i]:
            raise DisconnectedError(
                explain(
                    f"neither the T1 nor the T2 loss depends on {paths[i]}",
                    "Its hypergradient would be zero whatever its value.",
                    (
                        "it is not used, or used under another name: remove it, or pass allow_unused=True "
                        "to get zeros",
                        "it was detached inside the loss, or its value was taken out of the framework: "
                        "keep it in the framework's own operations, for NumPy those of autograd.numpy",
                        "only the optimiser uses it, and this estimator does not differentiate through "
                        "the optimiser: take Greedy(response='update') or Unrolled",
                    ),
                ),
                paths[i],
            )


def check_start(name: str, start: Any) -> None:
    """Check that a start is a function of the hyperparameters.

    Raises:
        ArgumentError: if it is not.
    """
    if start is not None and not callable(start):
        raise ArgumentError(
            f"{name}: start = {start!r}; it is a function of the hyperparameters that gives θ_0"
        )


def starting(
    backend: Backend, start: Callable[[Tree], Tree], rule: UpdateRule, state: State
) -> Callable[[Tree], Inner]:
    """λ ↦ z_0: parameters by the user's function, and a fresh optimiser.

    Raises:
        ArgumentError, LeafTypeError: when called, if they are not like those of the state.
    """

    def begin(hparams: Tree) -> Inner:
        params = start(hparams)
        check_same(backend, "start", params, "params", state.params)
        return Inner(params, rule.init(backend, params), state.aux)

    return begin


def inner_state(state: State) -> Inner:
    """The part z of a state on which the update map acts."""
    return Inner(state.params, state.opt_state, state.aux)


def state_after(state: State, z: Inner, step: Any) -> State:
    """The state in which training left z; what an estimator remembers stays as it is."""
    return State(z.params, z.opt_state, step, state.memory, z.aux)
