"""Who competes: estimators in a tuner, and searches that train again for each trial."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.problem import Problem, Sample
from hypergrad.backend import Tree
from hypergrad.updates import UpdateRule

FEW = 16
"""A number of hyperparameters up to which there are tangents of each, and a search among them one by one."""
WORST = 1e9
"""The loss of a trial that diverged."""


class Point(NamedTuple):
    """Where a method stands after so many gradients and seconds of its own."""

    gradients: float
    seconds: float
    hparams: Tree
    bytes_held: float = 0.0


class Method(ABC):
    """A way to find hyperparameters for a problem."""

    tunes: ClassVar[bool]
    """Does it move by hypergradients, at a rate?"""

    @abstractmethod
    def points(self, problem: Problem, sample: Sample, rate: float | None) -> Iterator[Point]:
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

    def points(self, problem: Problem, sample: Sample, rate: float | None) -> Iterator[Point]:
        backend, tuner = problem.backend, self.tuner
        spent, seconds, lam, k, last = 0.0, 0.0, problem.hparams, 0, None
        # As often as λ moves, but not more than ten times in a run.
        piece = max(problem.steps // 10, tuner.recipe.closing_steps)
        yield Point(0.0, 0.0, lam)
        while True:
            episode = sample.episode(k, lam)
            state, k = tuner.init(episode.params, lam, backend=backend), k + 1
            if last is None:
                first, moments = state.hyper_state
                last = state._replace(hyper_state=(backend.asarray(np.array(rate), like=first), moments))
            state = last._replace(inner=self._again(state.inner, last.inner), start=state.start)
            for begin in range(0, problem.steps, piece):
                # The list of a piece is read from its first batch on, since pieces are of one length.
                batches = episode.train[begin : begin + piece]
                began = time.perf_counter()
                run = tuner.run(
                    episode.params,
                    lam,
                    batches,
                    episode.val,
                    piece,
                    resume=(state, hg.History.start(backend, lam)),
                    progress=False,
                    backend=backend,
                )
                state, lam = run.state, run.hparams
                backend.to_numpy(backend.ravel(lam)[0])  # waits
                seconds += time.perf_counter() - began
                spent += float(run.history.cost[-1])
                yield Point(spent, seconds, lam, np.max(run.history.reports["bytes_held"][1:], initial=0.0))
            last = state

    def _again(self, fresh: Any, last: Any) -> Any:
        """The start of a run; the solution of a linear system is carried on, as λ is."""
        if isinstance(self.tuner.estimator, hg.Implicit):
            return fresh._replace(memory=last.memory)
        return self.tuner.estimator.restarted(fresh, last)


@dataclass(frozen=True)
class Search(Method):
    """A training run with λ fixed for each trial; the best on T2 so far counts.

    ``tied`` searches for one number for each leaf, as users do where a leaf has many.
    """

    tunes: ClassVar[bool] = False

    tied: bool = False

    def points(self, problem: Problem, sample: Sample, rate: float | None) -> Iterator[Point]:
        backend, seconds, k = problem.backend, 0.0, 0
        best = float("inf"), problem.hparams
        yield Point(0.0, 0.0, problem.hparams)
        sizes = [int(np.prod(backend.describe(leaf).shape)) for leaf in backend.flatten(problem.hparams)[0]]
        repeats = np.array(sizes if self.tied else [1] * sum(sizes))
        trials = self.trials(len(repeats), sample.seed)
        shares = next(trials)
        while True:
            lam = problem.place(np.repeat(shares, repeats))
            episode = sample.episode(k, lam)
            began = time.perf_counter()
            loss = sample.validate(problem.trained(lam, episode), lam)
            shares, k = trials.send(loss if np.isfinite(loss) else WORST), k + 1
            seconds += time.perf_counter() - began
            best = min(best, (loss, lam), key=lambda pair: pair[0] if np.isfinite(pair[0]) else WORST)
            yield Point(float(k * problem.steps), seconds, best[1])

    @abstractmethod
    def trials(self, count: int, seed: int) -> Generator[np.ndarray, float, None]:
        """Shares of the box, to each of which a loss is sent back."""


@dataclass(frozen=True)
class RandomSearch(Search):
    """Evenly in the box (Bergstra and Bengio 2012)."""

    def trials(self, count: int, seed: int) -> Generator[np.ndarray, float, None]:
        rng = np.random.default_rng((seed, 2))
        while True:
            yield rng.random(count)


@dataclass(frozen=True)
class TPE(Search):
    """Optuna's tree-structured Parzen estimator, as it comes (Bergstra et al. 2011)."""

    def trials(self, count: int, seed: int) -> Generator[np.ndarray, float, None]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        while True:
            trial = study.ask()
            loss = yield np.array([trial.suggest_float(str(k), 0.0, 1.0) for k in range(count)])
            study.tell(trial, loss)


def roster(problem: Problem) -> dict[str, Method]:
    """The methods that make sense on a problem, by name."""
    rule, steps, start, window = problem.rule, problem.steps, problem.start, problem.steps // 10
    few, found = problem.count <= FEW, dict[str, Method]()

    def tuned(estimator: hg.HypergradientEstimator, every: int) -> Tuned:
        update = None if estimator.training_steps else rule
        return Tuned(hg.Tuner(problem.bilevel, estimator, problem.space, Paced(), every=every, update=update))

    if start is None:
        found["greedy, every step"] = tuned(hg.Greedy(rule), 1)
        found[f"greedy, every {window}"] = tuned(hg.Greedy(rule), window)
    else:  # only the last step of a run has a validation loss that matters
        found["greedy"] = tuned(hg.Greedy(rule), steps)
    found |= {name: tuned(*how) for name, how in problem.implicit.items()}
    if start is None:
        found[f"unrolled, {window} steps"] = tuned(hg.Unrolled(rule, window), window)
    found["unrolled, whole run"] = tuned(hg.Unrolled(rule, steps, start=start), steps)
    if start is None and few:
        found[f"forward, {window} steps"] = tuned(hg.Forward(rule, window), window)
    if not few:
        found["forward, 4 directions"] = tuned(hg.Forward(rule, steps, directions=4, start=start), steps)
    if problem.low:
        for name, search in {"random search": RandomSearch, "TPE": TPE}.items():
            if search is TPE and find_spec("optuna") is None:
                continue
            if few:
                found[name] = search()
            if problem.count > len(problem.hparams):
                found[f"{name}, tied"] = search(tied=True)
    return found
