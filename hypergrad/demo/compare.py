"""Estimators and a random search on equal budgets of gradients."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.checks.hypergradient import check_hypergradient
from hypergrad.demo import network
from hypergrad.demo.data import Data
from hypergrad.estimators import Checks, Greedy, HypergradientEstimator, Implicit, State, Unrolled
from hypergrad.problems.step import Inner, Training
from hypergrad.solvers import Neumann
from hypergrad.tapes import Trajectory
from hypergrad.tuning.spaces import Positive, Real
from hypergrad.tuning.tuner import Tuner
from hypergrad.updates import SGD, Adam

RULE = SGD(0.05, momentum=0.9)
BATCH = 100
TRIALS = 8
WARM_UP, HORIZON = 100, 50
SPACE = {"log_l2": Real(), "noise": Positive("softplus")}
POOR = {"log_l2": -2.5, "noise": 2.0}
GRID = {"log_l2": (-11.0, 0.0), "noise": (0.0, 2.5)}


@final
@dataclass(frozen=True)
class Contestant:
    """The result of one method, and the path that its hyperparameters took.

    ``cost`` is in training gradients; ``cosine`` and ``relative_error`` compare its first hypergradient
    with central differences; ``trajectory`` has a row (gradients spent, noise, log L2 of each layer) for
    each update.
    """

    name: str
    hparams: dict[str, Any]
    val_loss: float
    test_error: float
    cost: float
    seconds: float
    bytes_held: float
    cosine: float | None
    relative_error: float | None
    trajectory: list[list[float]]


@final
@dataclass(frozen=True)
class Comparison:
    """All contestants, and the validation loss over a grid of tied hyperparameters."""

    data: str
    backend: str
    seed: int
    budget: int
    contestants: list[Contestant]
    grid: dict[str, Any]
    versions: dict[str, str]

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


Notify = Callable[[str], None]


def stages(grid: int) -> int:
    """Return how often `compare` reports progress."""
    return 7 + grid


def compare(
    backend: Backend, data: Data, seed: int, budget: int, grid: int = 6, notify: Notify = lambda _: None
) -> Comparison:
    """Train from deliberately poor regularisation by each method, spending ``budget`` gradients on each.

    A second-order product counts as two gradients. All methods use the same network, batches, start and
    optimiser; the hyper-optimiser is Adam throughout.
    """
    setting = _Setting(backend, data, seed, budget)
    notify("first hypergradient by central differences")
    setting.measure_reference()
    contestants = []
    methods: dict[str, Callable[[], dict[str, Any]]] = {
        "fixed, poor": setting.fixed,
        f"random search ×{TRIALS}": setting.random_search,
        "greedy, every step": lambda: setting.tuned(Greedy(RULE), every=1),
        "greedy, every 10": lambda: setting.tuned(Greedy(RULE), every=10),
        "implicit, every 10": lambda: setting.tuned(setting.implicit, every=10),
        f"unrolled, {HORIZON} steps": lambda: setting.tuned(Unrolled(RULE, HORIZON), every=HORIZON),
    }
    for name, method in methods.items():
        notify(name)
        contestants.append(Contestant(name, **method()))
    surface = setting.surface(grid, notify)
    packages = {name: version(name) for name in ("hypergradients", "numpy", "autograd", "optree")}
    return Comparison(
        data.name,
        backend.name,
        seed,
        budget,
        contestants,
        surface,
        {"python": platform.python_version(), **packages},
    )


class _Setting:
    """What all methods share: one problem, one start, one budget."""

    implicit = Implicit(Neumann(max_steps=5, step_size=0.05), checks=Checks(away="ignore"))

    def __init__(self, backend: Backend, data: Data, seed: int, budget: int) -> None:
        self.backend, self.data, self.seed, self.budget = backend, data, seed, budget
        self.problem = network.bilevel(backend)
        self.start = network.init_params(backend, data.train, seed)
        self.poor = network.init_hparams(backend, **POOR)
        self.train = network.minibatches(backend, data.train, BATCH, seed)
        self.val = network.minibatches(backend, data.val, BATCH, seed + 1)
        self.all_val = network.full_batch(backend, data.val)

    def plain(self, hparams: Tree, steps: int) -> Tree:
        """Train with the hyperparameters fixed."""
        phi = Training(self.backend, self.problem, RULE)
        z = Inner(self.start, RULE.init(self.backend, self.start))
        return Trajectory(phi, self.train, 0, steps).run(z, hparams)[0].params

    def measure_reference(self) -> None:
        """Measure the hypergradient of the next steps, at a point that plain training has reached."""
        self.point = self.plain(self.poor, WARM_UP)
        check = check_hypergradient(
            self.problem, self.point, self.poor, self.train, self.all_val, Unrolled(RULE, HORIZON)
        )
        self.reference = check.differences

    def first(self, estimator: HypergradientEstimator) -> tuple[float, float, float]:
        """Return cost, cosine and relative error of an estimator's hypergradient at that point."""
        state = estimator.init(self.problem, self.point, self.poor)
        out = estimator.estimate(self.problem, State(*state), self.poor, self.train, self.all_val)
        g = self.backend.to_numpy(self.backend.ravel(out.hypergradient)[0])
        cosine = g @ self.reference / (np.linalg.norm(g) * np.linalg.norm(self.reference))
        error = np.linalg.norm(g - self.reference) / np.linalg.norm(self.reference)
        return float(out.report.cost), float(cosine), float(error)

    def evaluate(self, params: Tree) -> tuple[float, float]:
        """Return the loss on all of T2, and the test error."""
        loss = float(self.backend.to_numpy(self.problem.outer(params, None, self.all_val)))
        return loss, network.error_rate(self.backend, params, self.data.test)

    def fixed(self) -> dict[str, Any]:
        begin = time.perf_counter()
        params = self.plain(self.poor, self.budget)
        return self._row(params, self.poor, self.budget, begin, [self._point(0, self.poor)])

    def random_search(self) -> dict[str, Any]:
        begin, rng, steps = time.perf_counter(), np.random.default_rng(self.seed), self.budget // TRIALS
        tried, points = [], []
        for trial in range(TRIALS):
            drawn = network.init_hparams(self.backend, *(rng.uniform(*GRID[k]) for k in ("log_l2", "noise")))
            params = self.plain(drawn, steps)
            tried.append((self.evaluate(params)[0], trial, params, drawn))
            points.append(self._point((trial + 1) * steps, drawn))
        _, _, params, drawn = min(tried, key=lambda row: row[:2])
        return self._row(params, drawn, steps * TRIALS, begin, points)

    def tuned(self, estimator: HypergradientEstimator, every: int) -> dict[str, Any]:
        cost, cosine, error = self.first(estimator)
        trains = estimator.training_steps > 0
        # The less frequent the updates, the larger each may be.
        hyper_update = Adam(0.05 * every**0.5)
        tuner = Tuner(
            self.problem, estimator, SPACE, hyper_update, every=every, update=None if trains else RULE
        )
        cycle = max(every, estimator.training_steps)
        steps = cycle * max(1, int(self.budget / (cycle - estimator.training_steps + cost)))
        begin = time.perf_counter()
        run = tuner.run(self.start, self.poor, self.train, self.val, steps, progress=False)
        rows = zip(
            run.history.cost,
            run.history.values["hparams['noise']"],
            run.history.values["hparams['log_l2']"],
            strict=True,
        )
        points = [[float(spent), float(noise), *map(float, l2)] for spent, noise, l2 in rows]
        bytes_held = float(np.nanmax(run.history.reports["bytes_held"]))
        row = self._row(run.params, run.hparams, run.history.cost[-1], begin, points)
        return row | {"bytes_held": bytes_held, "cosine": cosine, "relative_error": error}

    def surface(self, size: int, notify: Notify) -> dict[str, Any]:
        """Return the validation loss of plain training over a grid, with both layers' penalties tied."""
        axes = {name: np.linspace(*GRID[name], size) for name in GRID}
        steps = max(20, self.budget // TRIALS)
        losses = np.empty((size, size))
        for i, log_l2 in enumerate(axes["log_l2"]):
            notify("grid of the validation loss")
            for j, noise in enumerate(axes["noise"]):
                params = self.plain(network.init_hparams(self.backend, log_l2, noise), steps)
                losses[i, j] = self.evaluate(params)[0]
        return {name: axis.tolist() for name, axis in axes.items()} | {"val_loss": losses.tolist()}

    def _point(self, spent: float, hparams: Tree) -> list[float]:
        numbers = self.backend.to_numpy
        return [float(spent), float(numbers(hparams["noise"])), *numbers(hparams["log_l2"]).tolist()]

    def _row(
        self, params: Tree, hparams: Tree, cost: float, begin: float, trajectory: list[list[float]]
    ) -> dict[str, Any]:
        seconds = time.perf_counter() - begin
        loss, error = self.evaluate(params)
        return {
            "hparams": {name: self.backend.to_numpy(leaf).tolist() for name, leaf in hparams.items()},
            "val_loss": loss,
            "test_error": error,
            "cost": float(cost),
            "seconds": seconds,
            "bytes_held": 0.0,
            "cosine": None,
            "relative_error": None,
            "trajectory": trajectory,
        }
