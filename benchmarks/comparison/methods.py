"""Who competes: estimators in a tuner, and searches that train again for each trial."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np
from comparison.problem import Problem, Sample

import hypergrad as hg
from hypergrad.backend import Tree
from hypergrad.updates import UpdateRule

SEARCHED = 100
"""No search among more numbers than that."""
FORWARD = 16
"""No tangents of more."""


class Point(NamedTuple):
    """Where a method stands after so many gradients and seconds of its own."""

    gradients: float
    seconds: float
    hparams: Tree
    val_loss: float
    """As the method sees it, of parameters that it has trained itself."""
    bytes_held: float = 0.0


class Method(ABC):
    """A way to find hyperparameters for a problem."""

    tunes: ClassVar[bool]
    """Does it move by hypergradients, at a rate?"""

    @abstractmethod
    def points(self, problem: Problem, sample: Sample, rate: float) -> Iterator[Point]:
        """One after another, for as long as one asks; the first is where tuning begins, at no price."""


@dataclass(frozen=True)
class Paced(UpdateRule):
    """Adam whose rate lies in its state, so that one compiled program serves every rate."""

    adam: UpdateRule = field(default_factory=lambda: hg.Adam(lambda rate: rate, beta2=0.99))

    def init(self, backend: Any, params: Any) -> Any:
        first = backend.flatten(params)[0][0]
        return backend.asarray(np.array(0.0), like=first), self.adam.init(backend, params)

    def update(
        self, backend: Any, gradient: Any, opt_state: Any, params: Any, hparams: Any, step: Any
    ) -> tuple[Any, Any]:
        rate, moments = opt_state
        params, moments = self.adam.update(backend, gradient, moments, params, rate, step)
        return params, (rate, moments)


@dataclass(frozen=True)
class Tuned(Method):
    """Run after run from a fresh start, with λ and its optimiser carried on from run to run."""

    tunes: ClassVar[bool] = True

    tuner: hg.Tuner

    def points(self, problem: Problem, sample: Sample, rate: float) -> Iterator[Point]:
        backend, lam, carried = problem.backend, problem.hparams, None
        spent, seconds, k = 0.0, 0.0, 0
        yield Point(0.0, 0.0, lam, float("nan"))
        while True:
            episode = sample.episode(k, lam)
            state = self.tuner.init(episode.params, lam, backend=backend)
            if carried is None:
                start, moments = state.hyper_state
                carried = state.free, (backend.asarray(np.array(rate), like=start), moments), state.updates
            free, hyper_state, updates = carried
            state = state._replace(free=free, hyper_state=hyper_state, updates=updates)
            began = time.perf_counter()
            run = self.tuner.run(
                episode.params,
                lam,
                episode.train,
                episode.val,
                problem.steps,
                resume=(state, hg.History.start(backend, lam)),
                progress=False,
                backend=backend,
            )
            lam = run.hparams
            backend.to_numpy(backend.ravel(lam)[0])  # waits
            seconds += time.perf_counter() - began
            spent += float(run.history.cost[-1])
            carried, k = (run.state.free, run.state.hyper_state, run.state.updates), k + 1
            held = float(np.nanmax(run.history.reports["bytes_held"]))
            yield Point(spent, seconds, lam, float(run.history.outer_values[-1]), held)


@dataclass(frozen=True)
class Search(Method):
    """A training run with λ fixed for each trial; the best on T2 so far counts."""

    tunes: ClassVar[bool] = False

    def points(self, problem: Problem, sample: Sample, rate: float) -> Iterator[Point]:
        best, seconds, k = (float("inf"), problem.hparams), 0.0, 0
        yield Point(0.0, 0.0, problem.hparams, float("nan"))
        trials = self.trials(problem, int(rate))
        shares = next(trials)
        while True:
            lam = problem.place(shares)
            episode = sample.episode(k, lam)
            began = time.perf_counter()
            params = problem.trained(lam, episode)
            loss = sample.judge(params, lam)["val_loss"]
            loss = loss if np.isfinite(loss) else 1e9
            shares, k = trials.send(loss), k + 1
            seconds += time.perf_counter() - began
            best = min(best, (loss, lam), key=lambda pair: pair[0])
            yield Point(float(k * problem.steps), seconds, best[1], best[0])

    def trials(self, problem: Problem, seed: int) -> Any:
        """A generator of shares of the box, to which losses are sent."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomSearch(Search):
    """Evenly in the box (Bergstra and Bengio 2012)."""

    def trials(self, problem: Problem, seed: int) -> Any:
        rng = np.random.default_rng((seed, 4))
        while True:
            yield rng.random(problem.count)


@dataclass(frozen=True)
class TPE(Search):
    """Optuna's tree-structured Parzen estimator, as it comes (Bergstra et al. 2011)."""

    def trials(self, problem: Problem, seed: int) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        while True:
            trial = study.ask()
            loss = yield np.array([trial.suggest_float(str(k), 0.0, 1.0) for k in range(problem.count)])
            study.tell(trial, loss)


@dataclass(frozen=True)
class Roster:
    """The methods that make sense on a problem, by name."""

    problem: Problem

    def tuned(self, estimator: hg.HypergradientEstimator, every: int) -> Tuned:
        update = None if estimator.training_steps else self.problem.rule
        bilevel, space = self.problem.bilevel, self.problem.space
        return Tuned(hg.Tuner(bilevel, estimator, space, Paced(), every=every, update=update))

    @cached_property
    def methods(self) -> dict[str, Method]:
        problem, window = self.problem, self.problem.steps // 10
        rule, steps, start = problem.rule, problem.steps, problem.start
        found: dict[str, Method] = {}
        if start is None:
            found["greedy, every step"] = self.tuned(hg.Greedy(rule), 1)
            found[f"greedy, every {window}"] = self.tuned(hg.Greedy(rule), window)
        else:  # only the last step of a run has a validation loss that matters
            found["greedy"] = self.tuned(hg.Greedy(rule), steps)
        found |= {name: self.tuned(*how) for name, how in problem.implicit.items()}
        if start is None:
            found[f"unrolled, {window} steps"] = self.tuned(hg.Unrolled(rule, window), window)
            if problem.count <= FORWARD:
                found[f"forward, {window} steps"] = self.tuned(hg.Forward(rule, window), window)
        found["unrolled, whole run"] = self.tuned(hg.Unrolled(rule, steps, start=start), steps)
        if problem.count > FORWARD:
            forward = hg.Forward(rule, steps, directions=4, start=start)
            found["forward, 4 directions"] = self.tuned(forward, steps)
        if 0 < problem.count <= SEARCHED and problem.low:
            found["random search"] = RandomSearch()
            if find_spec("optuna") is not None:
                found["TPE"] = TPE()
        return found
