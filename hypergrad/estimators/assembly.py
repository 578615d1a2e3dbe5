"""Code that estimators share: the start of a run, and the assembly of an estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import check_same
from hypergrad.errors import ArgumentError, DisconnectedError, ZeroResponseWarning, explain, warn
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
    inner_used: Callable[[], Tree] | None,
    *,
    solve: SolveReport | None = None,
    tape: TapeReport | None = None,
    difference_error: Scalar | None = None,
) -> Estimate[Any]:
    """Add the direct and the response term, and report both.

    ``inner_used`` returns, for each hyperparameter, whether C̃1 is computed from it. It is called only if
    neither term depends on some hyperparameter: one that is merely added to C̃1 has no response, but is used.
    ``None`` allows unused hyperparameters.

    Raises:
        DisconnectedError: for a hyperparameter that neither loss uses.

    Warns:
        ZeroResponseWarning: for a hyperparameter that a loss is computed from, without effect on ∇C̃1 or C2.
    """
    if inner_used is not None:
        _check_connected(backend, validation, reached, inner_used)
    held = spent.bytes_held
    if isinstance(held, int) and held >= 2**31:
        held = float(held)  # a compiled program may have only 32-bit integers
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
            observed.inner_values,
            difference_error,
        ),
    )


def used_by_inner(
    backend: Backend, problem: Problem, z: Inner, hparams: Tree, first: Callable[[], Tree]
) -> Callable[[], Tree]:
    """Return a function that finds which hyperparameters C̃1 uses, at the cost of one evaluation."""
    return lambda: problem.uses(backend, z.params, hparams, first(), z.aux)


def _check_connected(
    backend: Backend, validation: Validation, response: Tree, inner_used: Callable[[], Tree]
) -> None:
    flags = zip(backend.flatten(validation.reached)[0], backend.flatten(response)[0], strict=True)
    unreached = [i for i, (outer, inner) in enumerate(flags) if not (outer or inner)]
    if not unreached:
        return
    draws = backend.random.state()
    by_inner, by_outer = (backend.flatten(uses())[0] for uses in (inner_used, validation.uses))
    backend.random.restore(draws)
    paths = backend.paths(validation.reached, "hparams")
    sloped = "it passes through operations without a slope, such as a rounding or a comparison: relax them"
    for i in unreached:
        if by_inner[i]:
            warn(
                explain(
                    f"the T1 loss depends on {paths[i]}, and its gradient by the parameters does not",
                    "Its hypergradient is exactly zero.",
                    (
                        "it multiplies parameters that were detached inside the loss: leave them attached",
                        sloped,
                        "it is merely added to the loss: remove it, or pass allow_unused=True",
                    ),
                ),
                ZeroResponseWarning,
                paths[i],
            )
        elif by_outer[i]:
            warn(
                explain(
                    f"the T2 loss depends on {paths[i]} in steps alone, which have no slope",
                    "Its hypergradient is exactly zero.",
                    (sloped, "it is meant so: pass allow_unused=True"),
                ),
                ZeroResponseWarning,
                paths[i],
            )
        else:
            raise DisconnectedError(
                explain(
                    f"neither the T1 nor the T2 loss depends on {paths[i]}",
                    "Its hypergradient would be zero whatever its value.",
                    (
                        "it is not used, or used under another name: remove it, or pass allow_unused=True "
                        "to get zeros",
                        "it was detached inside the loss, or its value was taken out of the framework: "
                        "use the framework's own operations, for NumPy those of autograd.numpy",
                        "it is only compared or rounded, which has no slope: relax that",
                        "only the optimiser uses it, and this estimator does not differentiate through "
                        "the optimiser: use Greedy(response='update') or Unrolled",
                        "the optimiser was made with its value, which is a constant to it: give it a "
                        "function, as in hg.SGD(lambda h: h['lr']), or for optax in "
                        "hypergrad_jax.Optax(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), "
                        "{'learning_rate': lambda h: h['lr']})",
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
            f"{name}: start = {start!r}; it must be a function of the hyperparameters that returns θ_0"
        )


def start_map(
    backend: Backend, start: Callable[[Tree], Tree], rule: UpdateRule, state: State
) -> Callable[[Tree], Inner]:
    """Return λ ↦ z_0: the parameters that ``start`` returns, and a fresh optimiser state.

    Raises:
        ArgumentError, LeafTypeError: when called, if the parameters are not like those of the state.
    """

    def begin(hparams: Tree) -> Inner:
        params = start(hparams)
        check_same(backend, "start", params, "params", state.params)
        return Inner(params, rule.init(backend, params), state.aux)

    return begin


def inner_state(state: State) -> Inner:
    """Return the part z of a state on which the update map acts."""
    return Inner(state.params, state.opt_state, state.aux)


def state_after(state: State, z: Inner, step: Any) -> State:
    """Return the state after training to z; the estimator's memory is unchanged."""
    return State(z.params, z.opt_state, step, state.memory, z.aux)
