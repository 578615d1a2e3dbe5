"""How far an estimate is from the exact hypergradient, along one run with λ fixed."""

from __future__ import annotations

from typing import Any

import numpy as np
from comparison.methods import Roster, Tuned
from comparison.problem import Episode, Problem, Sample

import hypergrad as hg
from hypergrad import spaces


def exact(problem: Problem, episode: Episode, step: int) -> np.ndarray:
    """dC2/du of this run after ``step`` steps, all terms of the sum, in free coordinates."""
    estimator = hg.Unrolled(problem.rule, step, tape=hg.States(), start=problem.start)
    state = estimator.init(problem.bilevel, episode.params, problem.hparams, backend=problem.backend)
    run = problem.backend.compile(
        lambda state, train, val: (
            estimator.estimate(
                problem.bilevel, state, problem.hparams, train, val, backend=problem.backend
            ).hypergradient
        )
    )
    return in_free(problem, run(state, episode.train[:step], episode.val))


def in_free(problem: Problem, hypergradient: Any) -> np.ndarray:
    """Chained through the space, as the tuner does: what λ moves along."""
    backend, free = problem.backend, problem.free(problem.hparams)
    tree = spaces.spread(backend, problem.space, free)
    return np.asarray(
        backend.to_numpy(backend.ravel(spaces.chain(backend, tree, free, hypergradient))[0]), float
    )


def biases(
    problem: Problem, roster: Roster, sample: Sample, places: int
) -> dict[str, list[dict[str, float]]]:
    """By method: cosine with, and error relative to, the exact hypergradient, at equal distances in a run.

    The run is the first of a tuner whose rate is 0: the same batches and the same λ for all, and what a
    method carries from estimate to estimate is carried. Exact is the derivative of the run so far.
    """
    episode, steps = sample.episode(0, problem.hparams), problem.steps
    marks = (
        [steps]
        if problem.start
        else sorted({round(k * 10 / places) * steps // 10 for k in range(1, places + 1)})
    )
    truth = {mark: exact(problem, episode, mark) for mark in marks}
    found: dict[str, list[dict[str, float]]] = {}
    for name, method in roster.methods.items():
        if not isinstance(method, Tuned):
            continue
        rows = []
        state = method.tuner.init(episode.params, problem.hparams, backend=problem.backend)
        done = 0
        while done < steps:
            ahead = episode.train[done:] if method.tuner.closing_steps > 1 else [episode.train[done]]
            state, step = method.tuner.step(state, ahead, episode.val, backend=problem.backend)
            done += int(step.trained)
            if not bool(step.updated) or done not in truth:
                continue
            g, right = in_free(problem, step.estimate.hypergradient), truth[done]
            size = np.linalg.norm(right)
            rows.append(
                {
                    "step": done,
                    "cosine": float(g @ right / max(np.linalg.norm(g) * size, 1e-300)),
                    "relative_error": float(np.linalg.norm(g - right) / size),
                }
            )
        found[name] = rows
    return found
