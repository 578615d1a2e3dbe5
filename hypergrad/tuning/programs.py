"""The parts of a run that are pure functions of arrays, so that a backend can compile them.

Each takes the recipe, the backend and functions that read batches, and then arrays. `Programs` compiles it as
a separate program, and caches that; inside a larger program it is called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, final

from hypergrad.backend import Backend, Tree
from hypergrad.estimators import Estimate, State
from hypergrad.estimators.assembly import inner_state, state_after
from hypergrad.problems.batches import Batches, Read, one_batch, reading, single
from hypergrad.problems.step import Inner, Observation, Training
from hypergrad.tuning.recipe import Recipe
from hypergrad.tuning.state import Step, TunerState

Program = Callable[..., Any]
"""A pure function of arrays."""


@final
class Programs:
    """The programs of one recipe: each is compiled once, and those of older batch functions are dropped."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._compiled: Callable[..., Program] = lru_cache(maxsize=8)(self._compile)

    def __call__(self, backend: Backend, f: Callable[..., Any], *given: Any) -> Program:
        """Return ``f(recipe, backend, *given, …)`` as a separate program."""
        return (self._compiled if backend.compiles else self._compile)(backend, f, *given)

    def _compile(self, backend: Any, f: Callable[..., Any], *given: Any) -> Program:
        program: Program = backend.compile(partial(f, self.recipe, backend, *given))
        return program


def train_step(
    recipe: Recipe, backend: Backend, z: Inner, hparams: Tree, batch: Tree, t: Any
) -> tuple[Inner, Observation]:
    """Take one plain training step."""
    return Training(backend, recipe.problem, recipe.rule).step(z, hparams, batch, t)


def update_step(
    recipe: Recipe, backend: Backend, read: Read | None, state: TunerState, data: Tree, val: Tree
) -> tuple[TunerState, Step]:
    """Make an estimate with its training steps, and update λ unless there is a fault."""
    train: Batches = reading(data, read)
    lam, inner = recipe.hparams(backend, state.free), state.inner
    if recipe.restart:
        start = state.start
        fresh = recipe.estimator.init(recipe.problem, start.params, lam, aux=start.aux, backend=backend)
        inner = recipe.estimator.restarted(fresh, inner)
    observed = None
    if not recipe.trains:
        batch = one_batch("train", train, inner.step)
        z, observed = train_step(recipe, backend, inner_state(inner), lam, batch, inner.step)
        inner = state_after(inner, z, inner.step + 1)
        if not recipe.estimator.resamples:
            train = single(batch)
    out = recipe.estimator.estimate(recipe.problem, inner, lam, train, lambda _: val, backend=backend)
    new, step = _updated(recipe, backend, state, out, observed)
    return new._replace(inner=out.state), step


def tune_step(
    recipe: Recipe, backend: Backend, read: Read | None, state: TunerState, data: Tree, val: Tree
) -> tuple[TunerState, Step]:
    """Make an estimate at the present θ, and update λ unless there is a fault.

    Without ``read``, ``data`` is a list of batches. Of the inner state only the estimator's memory changes.
    """
    train: Batches = reading(data, read)
    lam, inner = recipe.hparams(backend, state.free), state.inner
    with backend.random.replay(backend.random.state()):
        out = recipe.estimator.estimate(recipe.problem, inner, lam, train, lambda _: val, backend=backend)
    new, step = _updated(recipe, backend, state, out, None)
    return new._replace(inner=inner._replace(memory=out.state.memory)), step


def _updated(
    recipe: Recipe, backend: Backend, state: TunerState, out: Estimate[Any], observed: Observation | None
) -> tuple[TunerState, Step]:
    """Return the state with λ updated, and the step without its count of training steps."""
    if observed is None:
        report = out.report
        observed = Observation(out.inner_value, report.inner_gradient_norm, inner_values=report.inner_values)
    updated = recipe.update_hparams(
        backend,
        state.free,
        state.hyper_state,
        out.hypergradient,
        state.updates,
        recipe.allows(backend, out, observed),
    )
    new = state._replace(free=updated.free, hyper_state=updated.hyper_state)
    step = Step(observed, 0, True, without_state(out), updated.clipped, updated.hparams)
    return new, step


def without_state(out: Estimate[Any]) -> Estimate[Any]:
    """Return an estimate without its state, which the tuner's state already holds."""
    return out._replace(state=State(None))


def with_state(state: TunerState, step: Step) -> Step:
    """Return the step with the state of its estimate restored."""
    if step.estimate is None:
        return step
    return step._replace(estimate=step.estimate._replace(state=state.inner))
