"""What is compared on: a way to train, hyperparameters of it, and samples of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

import hypergrad as hg
from benchmarks.shared.training import compiled
from hypergrad.backend import Backend, Tree
from hypergrad.tuning import spaces

JUDGING = 2**20
"""Episodes from here on are kept for judging: no method tunes on their minibatches."""


class Episode(NamedTuple):
    """One training run: where it begins, a batch of T1 for each of its steps, and T2."""

    params: Tree
    train: list[Tree]
    val: Tree


@dataclass(frozen=True)
class Options:
    """How much there is of everything. ``folder`` has the image sets, see ``hypergrad.demo.images``."""

    steps: int
    budget: int
    examples: int
    folder: Path | None


class Sample(ABC):
    """A problem's data, drawn from a seed."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed = problem, seed

    @abstractmethod
    def episode(self, k: int, hparams: Tree) -> Episode:
        """The k-th training run: its start may depend on the hyperparameters."""

    @abstractmethod
    def validate(self, params: Tree, hparams: Tree) -> float:
        """The validation loss."""

    @abstractmethod
    def test(self, params: Tree, hparams: Tree) -> dict[str, float]:
        """``test_loss`` on examples that nothing has seen, and the like."""

    def judged(self, hparams: Tree, reruns: int) -> dict[str, float]:
        """What models are worth that are trained with these hyperparameters: the mean of some runs."""
        rows = []
        for k in range(JUDGING, JUDGING + reruns):
            params = self.problem.trained(hparams, self.episode(k, hparams))
            rows.append({"val_loss": self.validate(params, hparams)} | self.test(params, hparams))
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


class Problem(ABC):
    """Losses, an update rule and hyperparameters: what a program is compiled from. Data are of a `Sample`.

    A *run* is ``steps`` training steps from the start. Hyperparameters are good when a run with them fixed
    ends with a low loss on T2.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    """Where it comes from."""
    rule: Any
    """The update rule of θ."""
    start: Any = None
    """λ ↦ θ_0, where the initial parameters are among the hyperparameters; elsewhere they are random."""
    hparams: Tree
    """Where tuning begins: a poor place."""
    space: Any
    low: Mapping[str, float]
    high: Mapping[str, float]
    """What a user would search in, by leaf, evenly in the coordinates of the space."""
    share: float = 1.0
    """Of the preset's steps; the budget is counted in runs."""

    def __init__(self, backend: Backend, options: Options) -> None:
        self.backend, self.options = backend, options
        self.steps = max(10, round(self.share * options.steps) // 10 * 10)
        self.runs = options.budget

    @property
    @abstractmethod
    def data(self) -> str:
        """Where the examples come from."""

    @property
    def implicit(self) -> Mapping[str, tuple[hg.Implicit, int]]:
        """Implicit estimators that make sense here, each with the steps from update to update."""
        return {}

    def neumann(self, step_size: float, every: int) -> dict[str, tuple[hg.Implicit, int]]:
        """Ten terms of the series, taken as they are (Lorraine et al. 2020)."""
        solver = hg.Neumann(10, step_size=step_size)
        return {
            "implicit, Neumann 10": (
                hg.Implicit(solver, checks=hg.Checks(away="ignore", unsolved="warn")),
                every,
            )
        }

    def amortised(self, rate: float) -> dict[str, tuple[hg.Implicit, int]]:
        """A product for each step of training (Dagréou et al. 2022)."""
        return {"implicit, amortised": (hg.Implicit(hg.Amortised(rate), checks=hg.Checks(away="ignore")), 1)}

    def cg(self, *settings: float) -> dict[str, tuple[hg.Implicit, int]]:
        """Conjugate gradients that begin with the last solution (Pedregosa 2016)."""
        warm = hg.Implicit(hg.Warm(hg.CG(*settings)), checks=hg.Checks(away="ignore", unsolved="warn"))
        return {"implicit, CG": (warm, self.steps // 10)}

    @abstractmethod
    def sample(self, seed: int) -> Sample:
        """Data, first weights and minibatches."""

    @abstractmethod
    def inner(self, params: Tree, hparams: Tree, batch: Tree) -> Any:
        """C̃1."""

    @abstractmethod
    def outer(self, params: Tree, hparams: Tree, batch: Tree) -> Any:
        """C2."""

    @cached_property
    def bilevel(self) -> hg.Bilevel:
        return hg.Bilevel(self.inner, self.outer)

    @property
    def count(self) -> int:
        """How many numbers the hyperparameters are."""
        leaves = self.backend.flatten(self.hparams)[0]
        return sum(int(np.prod(self.backend.describe(leaf).shape)) for leaf in leaves)

    def array(self, values: Any, dtype: str = "float32") -> Any:
        return self.backend.asarray(np.asarray(values, dtype))

    def trained(self, hparams: Tree, episode: Episode) -> Tree:
        """θ after a run with the hyperparameters fixed."""
        return self._train(episode.params, hparams, self.backend.stack(episode.train))

    @cached_property
    def _train(self) -> Callable[[Tree, Tree, Any], Tree]:
        return compiled(self.backend, self.bilevel, self.rule, self.steps)

    def free(self, hparams: Tree) -> Tree:
        """Free coordinates of hyperparameters."""
        return spaces.unconstrain(self.backend, spaces.spread(self.backend, self.space, hparams), hparams)

    def place(self, shares: np.ndarray) -> Tree:
        """The hyperparameters at these shares, between 0 and 1, of the box to search in."""
        sides = []
        for bound in (self.low, self.high):
            ones = {k: self.backend.xp.ones_like(leaf) for k, leaf in self.hparams.items()}
            corner = self.free({k: bound[k] * one for k, one in ones.items()})
            sides.append(self.backend.ravel(corner))
        (low, unravel), (high, _) = sides
        free = unravel(low + self.backend.asarray(shares, like=low) * (high - low))
        return spaces.constrain(self.backend, spaces.spread(self.backend, self.space, free), free)
