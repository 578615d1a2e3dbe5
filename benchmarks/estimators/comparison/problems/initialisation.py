"""(e) The initial parameters, from which a few steps learn three classes from one example of each."""

from __future__ import annotations

import numpy as np

import hypergrad as hg
from benchmarks.estimators.comparison.problem import JUDGING, Episode, Problem, Sample
from benchmarks.shared.data import pooled
from benchmarks.shared.networks import cross_entropies, tanh_network, weights

TASKS, WAYS, SHOTS, QUERIES = 16, 3, 1, 15
PULL = 0.2
"""Strength of the penalty towards the initial parameters (Rajeswaran et al. 2019), by which an estimator that
knows only the optimum sees them."""
SEEN = 60
"""Classes of 80 to learn from; the others are for the test."""


class Initialisation(Problem):
    """θ_0 of many small tasks."""

    name = "initialisation"
    title = f"few-shot classification, {WAYS} ways, {SHOTS} shot: the initial parameters"
    source = "MAML, Finn et al. 2017; implicit MAML, Rajeswaran et al. 2019"
    rule = hg.SGD(0.2)
    space = hg.Real()
    low, high = {}, {}
    data = "digits"
    share = 0.05

    def __init__(self, backend, options):
        super().__init__(backend, options)
        self.runs = round(options.budget / self.share / 4)
        first = weights(np.random.default_rng(0), 64, 32, WAYS)
        self.hparams = {"init": backend.map(self.array, first)}

    def start(self, hparams):
        """Each task has its own copy."""
        ones = self.array(np.ones((TASKS, 1, 1)))
        return self.backend.map(lambda leaf: ones * leaf, hparams["init"])

    @property
    def implicit(self):
        return self.neumann(0.2, self.steps)

    def sample(self, seed):
        return Tasks(self, seed)

    def losses(self, params, batch):
        """The mean loss of each task."""
        xp = self.backend.xp
        return xp.mean(cross_entropies(xp, self.logits(params, batch["x"]), batch["y"]), axis=-1)

    def logits(self, params, x):
        return tanh_network(self.backend.xp, params, x)

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
    """Scikit-learn's digits, turned and mirrored: a class is a digit in one of its eight positions.

    Validated is on other examples of the classes that are learned from, tested on classes never seen. The
    three digits of a task differ.
    """

    def __init__(self, problem, seed):
        super().__init__(problem, seed)
        (x, y), rng = pooled(), np.random.default_rng((seed, 0))
        order, classes, half = rng.permutation(len(x)), rng.permutation(80), len(x) // 2
        x, y = (x[order] - x.mean()) / x.std(), y[order]
        self.pools = {
            "learn": (x[:half], y[:half], classes[:SEEN]),
            "val": (x[half:], y[half:], classes[:SEEN]),
            "test": (x[half:], y[half:], classes[SEEN:]),
        }

    def tasks(self, pool, rng):
        """Examples to adapt to and examples to judge by, of each task."""
        (x, y, classes), adapt, judge = self.pools[pool], [], []
        for _ in range(TASKS):
            shuffled = rng.permutation(classes)
            _, first = np.unique(shuffled // 8, return_index=True)
            for label in shuffled[np.sort(first)[:WAYS]]:
                digit, position = divmod(label, 8)
                images = x[rng.choice(np.flatnonzero(y == digit), SHOTS + QUERIES, False)]
                turned = np.rot90(images, position % 4, (1, 2))
                turned = turned[:, :, ::-1] if position >= 4 else turned
                adapt.append(turned[:SHOTS])
                judge.append(turned[SHOTS:])

        def batch(parts):
            each = len(parts[0])
            labels = np.broadcast_to(np.repeat(np.eye(WAYS), each, 0), (TASKS, WAYS * each, WAYS))
            inputs = np.array(parts).reshape(TASKS, WAYS * each, -1)
            return {"x": self.problem.array(inputs), "y": self.problem.array(labels)}

        return batch(adapt), batch(judge)

    def drawn(self, pool, k, hparams):
        """A run on tasks of a pool."""
        train, val = self.tasks(pool, np.random.default_rng((self.seed, 1, k)))
        return Episode(self.problem.start(hparams), [train] * self.problem.steps, val)

    def episode(self, k, hparams):
        return self.drawn("learn", k, hparams)

    def adapted(self, pool, hparams, times):
        """Loss and error after adapting to tasks that nothing has learned from: the mean of some runs."""
        problem, rows = self.problem, []
        for k in range(JUDGING, JUDGING + times):
            episode = self.drawn(pool, k, hparams)
            params = problem.trained(hparams, episode)
            guess = problem.backend.to_numpy(problem.logits(params, episode.val["x"])).argmax(-1)
            wrong = np.mean(guess != problem.backend.to_numpy(episode.val["y"]).argmax(-1))
            rows.append((float(problem.outer(params, hparams, episode.val)), wrong))
        return [float(column) for column in np.mean(rows, axis=0)]

    def validate(self, params, hparams):
        return self.adapted("val", hparams, 1)[0]

    def test(self, params, hparams):
        return dict(zip(("test_loss", "test_error"), self.adapted("test", hparams, 1), strict=True))

    def judged(self, hparams, reruns):
        found = {}
        for pool in ("val", "test"):
            found[f"{pool}_loss"], found[f"{pool}_error"] = self.adapted(pool, hparams, 4 * reruns)
        return found
