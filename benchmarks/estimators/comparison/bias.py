"""How far one estimate is from the exact hypergradient, along one run with λ fixed where all begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.methods import Tuned, roster
from benchmarks.estimators.comparison.problem import Episode, Problem
from hypergrad.errors import HypergradError
from hypergrad.tuning import spaces


def exact(problem: Problem, episode: Episode, steps: int) -> np.ndarray:
    """dC2/du of this run after so many steps, all terms of the sum, in free coordinates."""
    estimator = hg.Unrolled(problem.rule, steps, tape=hg.States(), start=problem.start)
    state = estimator.init(problem.bilevel, episode.params, problem.hparams)
    out = estimator.estimate(problem.bilevel, state, problem.hparams, episode.train[:steps], episode.val)
    return in_free(problem, out.hypergradient)


def in_free(problem: Problem, hypergradient: Any) -> np.ndarray:
    """Chained through the space, as the tuner does: what λ moves along."""
    backend, free = problem.backend, problem.free(problem.hparams)
    chained = spaces.chain(backend, spaces.spread(backend, problem.space, free), free, hypergradient)
    return np.asarray(backend.to_numpy(backend.ravel(chained)[0]), float)


def biases(problem: Problem, seed: int, places: int) -> dict[str, list[dict[str, float]]]:
    """By method: cosine with, and error relative to, the exact hypergradient, at equal distances in a run.

    The run is the first of a tuner whose rate is 0: the same batches and the same λ for all, and what a
    method carries from estimate to estimate is carried. Exact is the derivative of the run so far.
    """
    episode, steps = problem.sample(seed).episode(0, problem.hparams), problem.steps
    tenths = [10] if problem.start else [round(10 * k / places) for k in range(1, places + 1)]
    truth = {tenth * steps // 10: exact(problem, episode, tenth * steps // 10) for tenth in tenths}
    found: dict[str, list[dict[str, float]]] = {}
    for name, method in roster(problem).items():
        if not isinstance(method, Tuned):
            continue
        found[name] = []
        try:
            for step, estimate in estimates(method.tuner, problem, episode):
                if step in truth:
                    g, right = in_free(problem, estimate.hypergradient), truth[step]
                    size = np.linalg.norm(right)
                    cosine = float(g @ right / max(np.linalg.norm(g) * size, 1e-300))
                    error = float(np.linalg.norm(g - right) / size)
                    found[name].append({"step": step, "cosine": cosine, "relative_error": error})
        except HypergradError as error:
            found[name].append({"fault": str(error).splitlines()[0]})
    return found


def estimates(tuner: hg.Tuner, problem: Problem, episode: Episode) -> Iterator[tuple[int, hg.Estimate]]:
    """Each estimate of a run, and the training steps before it."""
    state, done = tuner.init(episode.params, problem.hparams), 0
    while done < problem.steps:
        ahead = episode.train[done:] if tuner.recipe.closing_steps > 1 else [episode.train[done]]
        state, step = tuner.step(state, ahead, episode.val)
        done += int(step.trained)
        if bool(step.updated):
            yield done, step.estimate
