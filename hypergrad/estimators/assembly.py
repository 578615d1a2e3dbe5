"""What estimators share: where a run begins, and how an estimate is put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import check_same
from hypergrad.errors import ArgumentError, DisconnectedError, explain
from hypergrad.estimators.base import Estimate, State
from hypergrad.estimators.report import Faults, Report, SolveReport, TapeReport
from hypergrad.problems.base import Problem, Validation
from hypergrad.problems.condition import Spent
from hypergrad.problems.step import Inner, Observation
from hypergrad.updates import UpdateRule


def assemble(
    backend: Backend,
    validation: Validation,
    response: Tree,
    reached: Tree,
    observed: Observation,
    state: State,
    spent: Spent,
    unused: Callable[[], Tree] | None,
    *,
    solve: SolveReport | None = None,
    tape: TapeReport | None = None,
    difference_error: Scalar | None = None,
) -> Estimate[Any]:
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
        observed.inner_value,
        validation.value,
        Report(
            observed.gradient_norm,
            vectors.norm(backend, direct),
            vectors.norm(backend, constant),
            reached,
            spent.gradients,
            spent.products,
            held,
            Faults(observed.bad_step, observed.bad_leaf, validation.bad_leaf),
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
