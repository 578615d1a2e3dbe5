"""(e) The initial parameters, from which a few steps learn three classes from one example of each."""

from __future__ import annotations

import numpy as np
from comparison.networks import cross_entropies, dense, weights
from comparison.problem import Episode, Problem, Sample

import hypergrad as hg
from hypergrad.demo.images import load_images

TASKS, WAYS, SHOTS, QUERIES = 16, 3, 1, 15
PULL = 0.2
"""Strength of the penalty towards the initial parameters (Rajeswaran et al. 2019), by which an estimator that
knows only the optimum sees them."""
SEEN = 6
"""Digits to learn from; the others are for the test."""


class Initialisation(Problem):
    """θ_0 of many small tasks."""

    name = "initialisation"
    title = f"few-shot classification, {WAYS} ways, {SHOTS} shot: the initial parameters"
    source = "MAML, Finn et al. 2017; implicit MAML, Rajeswaran et al. 2019"
    rule = hg.SGD(0.2)
    space = hg.Real()
    low, high = {}, {}
    share = 0.05

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.runs = round(options.budget / self.share / 4)
        first = weights(np.random.default_rng(0), 64, 32, WAYS)
        self.hparams = {"init": backend.map(self.array, first)}
        self.prepare()

    def start(self, hparams):
        """Each task has its own copy."""
        ones = self.array(np.ones((TASKS, 1, 1)))
        return self.backend.map(lambda leaf: ones * leaf, hparams["init"])

    @property
    def implicit(self):
        neumann = hg.Implicit(hg.Neumann(10, step_size=0.2), tolerance=None, on_failure="warn")
        return {"implicit, Neumann 10": (neumann, self.steps)}

    def sample(self, seed):
        return Tasks(self, seed)

    def losses(self, params, batch):
        """The mean loss of each task."""
        xp, (first, last) = self.backend.xp, params
        logits = dense(last, xp.tanh(dense(first, batch["x"])))
        return xp.mean(cross_entropies(xp, logits, batch["y"]), axis=-1)

    def inner(self, params, hparams, batch):
        # The sum, so that each task has the gradient that it would have alone.
        sum_of, init = self.backend.xp.sum, hparams["init"]
        away = sum(
            sum_of((layer[name] - centre[name]) ** 2)
            for layer, centre in zip(params, init, strict=True)
            for name in layer
        )
        return sum_of(self.losses(params, batch)) + PULL / 2 * away

    def outer(self, params, hparams, batch):
        return self.backend.xp.mean(self.losses(params, batch))


class Tasks(Sample):
    """Scikit-learn's digits, turned and mirrored: some to learn from and to validate, others for the test.

    A class is a digit in one of its eight positions, as for Omniglot's letters; a task has three digits.
    """

    def __init__(self, problem, seed):
        found = load_images("digits")
        x, y = np.concatenate([found.x, found.x_test])[..., 0] / 255, np.concatenate([found.y, found.y_test])
        rng = np.random.default_rng((seed, 0))
        order, digits, half = rng.permutation(len(x)), rng.permutation(10), len(x) // 2
        x, y = (x[order] - x.mean()) / x.std(), y[order]
        self.problem, self.seed = problem, seed
        self.pools = {
            "learn": (x[:half], y[:half], digits[:SEEN]),
            "val": (x[half:], y[half:], digits[:SEEN]),
            "test": (x[half:], y[half:], digits[SEEN:]),
        }

    def tasks(self, pool, rng):
        """Examples to adapt to and examples to judge by, of each task."""
        (x, y, digits), adapt, judge = self.pools[pool], [], []
        for _ in range(TASKS):
            for digit in rng.permutation(digits)[:WAYS]:
                images = x[rng.choice(np.flatnonzero(y == digit), SHOTS + QUERIES, False)]
                turned = np.rot90(images, rng.integers(4), (1, 2))
                turned = turned[:, :, ::-1] if rng.integers(2) else turned
                adapt.append(turned[:SHOTS])
                judge.append(turned[SHOTS:])

        def batch(parts):
            each = len(parts[0])
            labels = np.broadcast_to(np.repeat(np.eye(WAYS), each, 0), (TASKS, WAYS * each, WAYS))
            inputs = np.array(parts).reshape(TASKS, WAYS * each, -1)
            return {"x": self.problem.array(inputs), "y": self.problem.array(labels)}

        return batch(adapt), batch(judge)

    def episode(self, k, hparams):
        train, val = self.tasks("learn", np.random.default_rng((self.seed, 2, k)))
        return Episode(self.problem.start(hparams), [train] * self.problem.steps, val)

    def judge(self, params, hparams):
        """Adapted anew, to tasks that nothing has seen; θ is not looked at."""
        problem, found = self.problem, {}
        for pool in ("val", "test"):
            losses, wrong = [], []
            for k in range(4):
                train, val = self.tasks(pool, np.random.default_rng((self.seed, 3, k)))
                begin = problem.start(hparams)
                adapted = problem.trained(hparams, Episode(begin, [train] * problem.steps, val))
                losses.append(float(problem.outer(adapted, hparams, val)))
                first, last = adapted
                logits = dense(last, problem.backend.xp.tanh(dense(first, val["x"])))
                guess, truth = (problem.backend.to_numpy(part).argmax(-1) for part in (logits, val["y"]))
                wrong.append(np.mean(guess != truth))
            found[f"{pool}_loss"], found[f"{pool}_error"] = float(np.mean(losses)), float(np.mean(wrong))
        return found
