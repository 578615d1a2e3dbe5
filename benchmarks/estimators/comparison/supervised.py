"""Problems with inputs and targets: T1 in minibatches, T2 and test whole."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from benchmarks.estimators.comparison.problem import Episode, Problem, Sample
from benchmarks.shared.data import pooled
from benchmarks.shared.networks import cross_entropies
from hypergrad.backend import Tree


class Supervised(Problem):
    """T1, T2 and test are pairs of inputs and targets; a batch has a number too, for its noise."""

    batch: int | None = 50
    """Examples in a minibatch; ``None`` is all of T1 at each step."""
    classes = 10

    def parts(self, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets of T1, T2 and test: images."""
        return self.images(rng)

    @abstractmethod
    def weights(self, rng: np.random.Generator) -> Any:
        """θ_0, in NumPy's arrays."""

    @abstractmethod
    def logits(self, params: Tree, hparams: Tree, x: Any, draw: Any = None) -> Any:
        """The model's output; ``draw`` is given in training."""

    def inner(self, params: Tree, hparams: Tree, batch: Tree) -> Any:
        return self.loss(self.logits(params, hparams, batch["x"], batch["draw"]), batch["y"])

    def outer(self, params: Tree, hparams: Tree, batch: Tree) -> Any:
        return self.loss(self.logits(params, hparams, batch["x"]), batch["y"])

    def loss(self, output: Any, y: Any) -> Any:
        return self.backend.xp.mean(cross_entropies(self.backend.xp, output, y))

    def noise(self, draw: Any, layer: int, like: Any) -> Any:
        """Standard normal numbers of this step and layer."""
        return self.backend.random.normal(layer, draw, tuple(like.shape), like)

    @property
    def inputs(self) -> int:
        return 64 if self.options.folder is None else 196

    @property
    def data(self) -> str:
        return "digits" if self.options.folder is None else "MNIST in 14 × 14 pixels"

    def images(self, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """As many in T2 as in T1, and for the test 2000, or all that are left."""
        x, y = pooled(self.options.folder)
        if self.options.folder is not None:
            x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4))
        n = self.options.examples
        rows = rng.permutation(len(x))[: 2 * n + 2000]
        x, y = x[rows].reshape(len(rows), -1), np.eye(self.classes)[y[rows]]
        x = (x - x[:n].mean(0)) / x[:n].std()
        return [(x[part], y[part]) for part in (slice(n), slice(n, 2 * n), slice(2 * n, None))]

    def sample(self, seed: int) -> Sample:
        return Drawn(self, seed)


class Drawn(Sample):
    """Data of a `Supervised` problem."""

    problem: Supervised

    def __init__(self, problem: Supervised, seed: int) -> None:
        super().__init__(problem, seed)
        self.t1, t2, test = problem.parts(np.random.default_rng((seed, 0)))
        self.t2, self.unseen = self._batch(*t2), self._batch(*test)
        self._loss = problem.backend.compile(problem.outer)
        self._outputs = problem.backend.compile(problem.logits)

    def _batch(self, x: np.ndarray, y: np.ndarray) -> Tree:
        return {"x": self.problem.array(x), "y": self.problem.array(y)}

    def episode(self, k: int, hparams: Tree) -> Episode:
        problem, (x, y) = self.problem, self.t1
        rng, steps = np.random.default_rng((self.seed, 1, k)), problem.steps
        start = problem.backend.map(problem.array, problem.weights(rng))
        draws = [{"draw": problem.array(d, "int32")} for d in rng.integers(2**31, size=steps)]
        if problem.batch is None:
            whole = self._batch(x, y)
            return Episode(start, [whole | draw for draw in draws], self.t2)
        passes = -(-steps * problem.batch // len(x))
        order = np.concatenate([rng.permutation(len(x)) for _ in range(passes)])[: steps * problem.batch]
        parts = order.reshape(steps, problem.batch)
        batches = [self._batch(x[rows], y[rows]) | draw for rows, draw in zip(parts, draws, strict=True)]
        return Episode(start, batches, self.t2)

    def validate(self, params: Tree, hparams: Tree) -> float:
        return float(self._loss(params, hparams, self.t2))

    def test(self, params: Tree, hparams: Tree) -> dict[str, float]:
        """With the share of test examples that are put into a wrong class, where targets are classes."""
        to_numpy, y = self.problem.backend.to_numpy, self.unseen["y"]
        found = {"test_loss": float(self._loss(params, hparams, self.unseen))}
        if y.ndim == 2 and y.shape[1] == self.problem.classes:
            outputs = to_numpy(self._outputs(params, hparams, self.unseen["x"]))
            found["test_error"] = float(np.mean(outputs.argmax(-1) != to_numpy(y).argmax(-1)))
        return found
