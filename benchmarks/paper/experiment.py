"""Runs of T1−T2 and of fixed hyperparameters from many starts, on the library's public interface.

A *setting* is a network and which hyperparameters it has; a *method* is how λ moves. A job trains a setting
by one method, or with λ fixed, from some starts, and leaves one JSON file: a job whose file is there is not
run again, so what was interrupted is resumed by the same command.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import data
import numpy as np
from frameworks import framework
from networks import AllConvolutional, Net

import hypergrad as hg
from hypergrad.updates import UpdateRule

EVERY, BATCH = 10, 100
NOISE, L2 = (0.0, 0.5), (1e-6, 1e-2)
"""Where the random starts are drawn from, evenly and evenly in the logarithm."""
POOR_NOISE, POOR_L2 = (0.5, 2.0), (1e-2, 1e-1)
"""The same with ``--poor``: beyond what anybody would take for reasonable."""
ROWS = 200
"""At most so many rows of a run's hyperparameters are kept."""


@dataclass(frozen=True)
class Preset:
    """How large everything is. ``epochs`` are passes over T1, ``size1`` and ``size2`` images in T1 and T2.

    ``travel`` multiplies the rates of an Adam that moves λ. Its steps have a fixed size, so a run with fewer
    updates than the paper's would not get as far; gradient descent keeps the paper's rates.
    """

    dataset: str
    sizes: dict[str, tuple[int, int]]
    mlps: dict[str, tuple[tuple[int, ...], ...]]
    channels: tuple[int, int]
    epochs: int
    starts: int
    grid: int
    trajectories: int
    points: int
    chunk: int
    travel: float
    repeats: int


PRESETS = {
    "smoke": Preset(
        dataset="digits",
        sizes={"digits": (500, 500)},
        mlps={"digits": ((20, 20),)},
        channels=(4, 8),
        epochs=4,
        starts=3,
        grid=3,
        trajectories=2,
        points=2,
        chunk=8,
        travel=20.0,
        repeats=2,
    ),
    "small": Preset(
        dataset="mnist",
        sizes={"digits": (500, 500)},
        mlps={"digits": ((100, 100, 100),)},
        channels=(16, 32),
        epochs=50,
        starts=10,
        grid=6,
        trajectories=6,
        points=20,
        chunk=49,
        travel=20.0,
        repeats=15,
    ),
    "paper": Preset(
        dataset="mnist",
        sizes={"mnist": (55000, 5000), "fashion-mnist": (55000, 5000), "svhn": (65000, 8257)},
        mlps={
            "mnist": ((1000,) * 3, (4000, 2000, 1000, 500, 250)),
            "fashion-mnist": ((2000,) * 3, (4000, 2000, 1000, 500, 250)),
            "svhn": ((2000,) * 3, (4000, 2000, 1000, 500, 250)),
        },
        channels=(96, 192),
        epochs=200,
        starts=20,
        grid=10,
        trajectories=8,
        points=40,
        chunk=4,
        travel=1.0,
        repeats=15,
    ),
}
DEFAULT_SIZES = {"smoke": (500, 500), "small": (2000, 1000), "paper": (45000, 5000)}
DEFAULT_MLPS = {"smoke": ((20, 20),), "small": ((100, 100, 100),), "paper": ((2000,) * 3,)}


@dataclass(frozen=True)
class Setting:
    """A network, and its hyperparameters: ``tied`` ones are scalars, others have an entry for each layer."""

    name: str
    layers: tuple[int, ...]
    hparams: tuple[str, ...]
    tied: bool
    batch_norm: bool
    convolutional: bool = False

    def net(self, inputs: tuple[int, ...]) -> Net:
        return (AllConvolutional if self.convolutional else Net)(self.layers, inputs, self.batch_norm)

    def width(self, name: str, inputs: tuple[int, ...]) -> tuple[int, ...]:
        layers = len(self.net(inputs).shapes())
        return (
            ()
            if self.tied or name == "input_noise"
            else {"hidden_noise": (layers - 2,), "l2": (layers,)}[name]
        )

    def filled(self, values: dict[str, float], inputs: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {k: np.full(self.width(k, inputs), v, np.float32) for k, v in values.items()}

    def random(self, seed: int, inputs: tuple[int, ...], poor: bool = False) -> dict[str, np.ndarray]:
        """A start in a reasonable interval, as the paper says, or in a poor one; one level for all layers."""
        rng = np.random.default_rng((seed, 2))
        noise = rng.uniform(*(POOR_NOISE if poor else NOISE), size=2)
        l2 = np.exp(rng.uniform(*np.log(POOR_L2 if poor else L2)))
        values = {"input_noise": noise[0], "hidden_noise": noise[1], "l2": l2}
        return self.filled({name: values[name] for name in self.hparams}, inputs)


def settings(preset: str, dataset: str) -> list[Setting]:
    """The first two are the pairs of figure 1: with L2, without batch normalisation; and with noise alone."""
    if dataset == "cifar10":
        channels = PRESETS[preset].channels
        return [Setting("cnn-noise", channels, ("input_noise", "hidden_noise"), False, True, True)]
    found, tied = [], dataset != "svhn"
    for layers in PRESETS[preset].mlps.get(dataset, DEFAULT_MLPS[preset]):
        size = "-".join(map(str, layers))
        both = (True, False) if tied and preset == "paper" else (tied,)
        for tie in both:
            suffix = size if tie else f"{size}-each"
            found.append(Setting(f"l2-{suffix}", layers, ("input_noise", "l2"), tie, False))
            found.append(Setting(f"noise-{suffix}", layers, ("input_noise", "hidden_noise"), tie, True))
    return found


@dataclass(frozen=True)
class Method:
    """How λ moves.

    ``code`` is what the authors' code did: −(∂²_λθ C̃1)ᵀ ∇_θ C2 at θ_t. ``exact`` differentiates through
    Adam's step and takes ∇_θ C2 at θ_{t+1}. ``clipped`` is the linear domain, clipped at 0; ``positive`` are
    coordinates without a boundary, logarithms for L2 and softplus for noise.
    """

    response: str
    domain: str

    @property
    def name(self) -> str:
        return f"{self.response}-{self.domain}"

    def estimator(self, update: UpdateRule) -> hg.Greedy:
        if self.response == "code":
            return hg.Greedy(update, response="gradient", lookahead=False)
        return hg.Greedy(update)

    def space(self, names: tuple[str, ...]) -> dict[str, Any]:
        if self.domain == "clipped":
            return {name: hg.NonNegative() for name in names}
        return {name: hg.Positive("exp" if name == "l2" else "softplus") for name in names}

    def update(self, name: str, travel: float) -> UpdateRule:
        """Gradient descent, 0.1 for noise and 1e-4 for L2, is the paper's for the gradient that it has.

        The exact response carries Adam's own step, a thousand times smaller; it takes the paper's other
        choice, Adam for λ, 1e-3 for noise and 1e-6 for L2. Without a boundary one rate of Adam serves all.
        """
        if self.domain == "positive":
            return hg.Adam(5e-3 * travel)
        if self.response == "code":
            return hg.SGD(1e-4 if name == "l2" else 0.1)
        return hg.Adam(travel * (1e-6 if name == "l2" else 1e-3))


METHODS = [Method(response, domain) for response in ("code", "exact") for domain in ("clipped", "positive")]
FIRST = METHODS[0]


@dataclass(frozen=True)
class ByName(UpdateRule):
    """An update rule of its own for each hyperparameter at the top of the tree."""

    rules: tuple[tuple[str, UpdateRule], ...]

    def init(self, backend: Any, params: Any) -> Any:
        return {name: rule.init(backend, params[name]) for name, rule in self.rules}

    def update(
        self, backend: Any, gradient: Any, opt_state: Any, params: Any, hparams: Any, step: Any
    ) -> Any:
        moved = {
            name: rule.update(backend, gradient[name], opt_state[name], params[name], hparams, step)
            for name, rule in self.rules
        }
        return {name: new for name, (new, _) in moved.items()}, {name: s for name, (_, s) in moved.items()}


def annealed_adam(lr: float, total: int) -> UpdateRule:
    """Adam whose rate is flat for two thirds of a run, and then falls linearly to 0."""

    def rate(hparams: Any, t: Any) -> Any:
        line = 3.0 * (1.0 - t / total)
        return lr * 0.5 * (1.0 + line - abs(1.0 - line))  # the smaller of 1 and line, traced or not

    return hg.Adam(hg.Schedule(rate))


class Lab:
    """A data set, a framework and a preset: what trains."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.preset_name, self.preset = options.preset, PRESETS[options.preset]
        self.dataset = options.dataset or (self.preset.dataset if options.data else "digits")
        self.ops, self.data_folder, self.seed = framework(options.backend), options.data, options.seed
        self.poor = options.poor
        self.out = options.out / self.preset_name / (self.dataset + ("-poor" if self.poor else ""))
        self.sizes = self.preset.sizes.get(self.dataset, DEFAULT_SIZES[self.preset_name])
        self.steps_an_epoch = self.sizes[0] // BATCH
        self.total = self.preset.epochs * self.steps_an_epoch // EVERY * EVERY

    @cached_property
    def images(self) -> data.Images:
        return data.load(self.dataset, self.data_folder)

    @cached_property
    def shared(self) -> dict[str, Any]:
        parts = {
            "x": self.images.x,
            "y": self.images.y,
            "x_test": self.images.x_test,
            "y_test": self.images.y_test,
        }
        return {k: self.ops.array(v.astype(np.int32) if k[0] == "y" else v) for k, v in parts.items()}

    @cached_property
    def settings(self) -> list[Setting]:
        return settings(self.preset_name, self.dataset)

    def tuner(self, setting: Setting, method: Method | None, every: int = EVERY) -> hg.Tuner:
        """With λ fixed it is a tuner whose turn to move λ never comes."""
        update = annealed_adam(2e-3 if setting.convolutional else 1e-3, self.total)
        problem = setting.net(self.images.shape).bilevel(self.ops)
        if method is None:
            return hg.Tuner(problem, FIRST.estimator(update), hg.Real(), every=self.total + 1)
        rules = tuple((name, method.update(name, self.preset.travel)) for name in setting.hparams)
        space = method.space(setting.hparams)
        return hg.Tuner(problem, method.estimator(update), space, ByName(rules), every=every)

    @lru_cache(maxsize=4)  # noqa: B019
    def program(self, setting: Setting, method: Method | None, steps: int) -> Any:
        """(states, what each start has, shared data, key, first step) -> new states and their history."""
        ops, tuner = self.ops, self.tuner(setting, method)

        def batch(start: Any, shared: Any, rows: Any) -> tuple[Any, Any]:
            return prepared(start, shared["x"][rows]), ops.one_hot(shared["y"][rows])

        def segment(state: Any, start: Any, shared: Any, key: Any, first: Any) -> tuple[Any, Any]:
            def train(t: Any) -> Any:
                return *batch(start, shared, start["order1"][t - first]), ops.draw(key, t)

            def val(update: Any) -> Any:
                return batch(start, shared, start["order2"][update - first // EVERY])

            state = state._replace(since=0)  # a segment is a multiple of EVERY
            history = hg.History.start(ops.backend, tuner.hparams(state, backend=ops.backend))
            resume = state, history
            run = tuner.run((), (), train, val, steps, progress=False, resume=resume, backend=ops.backend)
            log = {"values": run.history.values, "outer": run.history.outer_values}
            return run.state, log | {"inner": run.history.inner_values, "hparams": run.hparams}

        return ops.mapped(segment, (0, 0, None, None, None))

    @lru_cache(maxsize=2)  # noqa: B019
    def judge(self, setting: Setting) -> Any:
        """Error and cross-entropy of each start on the whole test set, on T2, and on as much of T1."""
        ops, net = self.ops, setting.net(self.images.shape)
        piece = 500 if setting.convolutional else 2500

        def measured(start: Any, inner: Any, x: Any, y: Any) -> dict[str, Any]:
            wrong, loss, count = 0.0, 0.0, len(y)
            for k in range(0, count, piece):
                part, labels = prepared(start, x[k : k + piece]), y[k : k + piece]
                logits, _ = net.logits(ops, inner.params, part, inner.aux)
                shifted = logits - ops.xp.max(logits, axis=-1, keepdims=True)
                logs = ops.xp.log(ops.xp.sum(ops.xp.exp(shifted), axis=-1))
                loss = loss + ops.xp.sum(logs - ops.xp.sum(shifted * ops.one_hot(labels), axis=-1))
                wrong = wrong + ops.xp.sum(ops.xp.where(ops.xp.argmax(logits, axis=-1) != labels, 1.0, 0.0))
            return {"error": wrong / count, "loss": loss / count}

        def all_parts(given: Any, shared: Any) -> dict[str, Any]:
            start, inner = given
            parts = {"test": measured(start, inner, shared["x_test"], shared["y_test"])}
            for name, rows in (("val", start["t2"]), ("train", start["t1"])):
                parts[name] = measured(start, inner, shared["x"][rows], shared["y"][rows])
            return {f"{name}_{kind}": v for name, part in parts.items() for kind, v in part.items()}

        return ops.in_turn(all_parts)

    def train(
        self,
        setting: Setting,
        method: Method | None,
        seeds: list[int],
        hparams: list[dict[str, np.ndarray]],
        points: int = 1,
    ) -> list[dict[str, Any]]:
        """One record for each start: its hyperparameters, how they moved, and errors at ``points`` places."""
        ops, net, tuner = self.ops, setting.net(self.images.shape), self.tuner(setting, method)
        splits = {seed: data.split(self.images, *self.sizes, seed) for seed in set(seeds)}
        begin = [net.start(seed) for seed in seeds]
        params, aux = (ops.stacked([b[k] for b in begin]) for k in (0, 1))
        first = ops.stacked(hparams)
        init = ops.mapped(lambda p, h, a: (tuner.init(p, h, aux=a, backend=ops.backend), ()), (0, 0, 0))
        states, _ = init(params, first, aux)
        while self.total % (points * EVERY):  # a run ends at its last step, where the rate is 0
            points -= 1
        length = self.total // points
        segment, judge = self.program(setting, method, length), self.judge(setting)
        records = [
            {"seed": seed, "start": plain(h), "path": [], "curve": []}
            for seed, h in zip(seeds, hparams, strict=True)
        ]
        step = 0
        while step < self.total:
            own = [self._own(splits[seed], seed, step, length) for seed in seeds]
            given = ops.stacked([{k: v for k, v in o.items() if v is not None} for o in own])
            states, log = segment(states, given, self.shared, ops.key(self.seed), step)
            step += length
            inner = self._inner(states)
            measures = ops.rows(judge(self._pairs(given, inner), self.shared))
            for record, logged, measure in zip(records, ops.rows(log), measures, strict=True):
                record["curve"].append({"step": step} | plain(measure))
                record["end"] = plain(logged["hparams"])
                if method is not None:
                    values = {path[len("hparams['") : -2]: v for path, v in logged["values"].items()}
                    thin = max(1, -(-(length // EVERY) * points // ROWS))
                    at = range(0 if step == length else thin, length // EVERY + 1, thin)
                    record["path"] += [
                        {"step": step - length + k * EVERY} | plain({n: v[k] for n, v in values.items()})
                        for k in at
                    ]
        for record in records:
            record |= record["curve"][-1]
        return records

    def _pairs(self, given: Any, inner: Any) -> Any:
        return (given, inner) if self.ops.name == "jax" else list(zip(given, inner, strict=True))

    def _inner(self, states: Any) -> Any:
        return states.inner if self.ops.name == "jax" else [state.inner for state in states]

    def _own(self, split: data.Split, seed: int, first: int, steps: int) -> dict[str, Any]:
        """What differs between starts: the preprocessing, and which images come when."""
        t1, t2 = split.t1, split.t2
        return {
            "centre": split.centre,
            "whiten": split.whiten,
            "t1": t1[: len(t2)].astype(np.int32),
            "t2": t2.astype(np.int32),
            "order1": order(t1, (self.seed, seed, 3), first, steps),
            "order2": order(t2, (self.seed, seed, 4), first // EVERY, steps // EVERY),
        }

    def job(self, setting: Setting, name: str, make: Any) -> list[dict[str, Any]]:
        """Records of a job, from its file if it is there."""
        path = self.out / setting.name / f"{name}.json"
        about = {
            "preset": self.preset_name,
            "dataset": self.images.title,
            "backend": self.ops.name,
            "setting": asdict(setting),
            "T1": self.sizes[0],
            "T2": self.sizes[1],
            "epochs": self.preset.epochs,
            "steps": self.total,
            "travel": self.preset.travel,
            "seed": self.seed,
        }
        about = json.loads(json.dumps(about | ({"poor": True} if self.poor else {})))
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["about"] | about != stored["about"]:
                raise SystemExit(f"{path} was made with other options: give another --out, or delete it")
            return stored["runs"]
        began = time.perf_counter()
        runs = make()
        about["seconds"] = round(time.perf_counter() - began, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"about": about, "runs": runs}) + "\n")
        partial.replace(path)
        print(f"{setting.name} {name}: {len(runs)} runs in {about['seconds']:.0f} s", flush=True)
        return runs

    def jobs(
        self, setting: Setting, name: str, method: Method | None, seeds: list[int], hparams: list[Any]
    ) -> list[dict[str, Any]]:
        """The same for many starts, a file for each chunk of them."""
        runs, size = [], 1 if setting.convolutional else self.preset.chunk
        for k in range(0, len(seeds), size):
            part = slice(k, k + size)
            runs += self.job(
                setting,
                f"{name}-{k:03d}",
                lambda part=part: self.train(setting, method, seeds[part], hparams[part]),
            )
        return runs

    def sweep(self) -> list[dict[str, Any]]:
        """Figures 4, 5 and 6: from random starts, fixed before, tuned by each method, and fixed after."""
        rows = []
        for setting in self.settings:
            seeds = [self.seed + k for k in range(self.preset.starts)]
            starts = [setting.random(seed, self.images.shape, self.poor) for seed in seeds]
            before = self.jobs(setting, "before", None, seeds, starts)
            for method in METHODS:
                tuned = self.jobs(setting, f"tuned-{method.name}", method, seeds, starts)
                ends = [numeric(run["end"]) for run in tuned]
                after = self.jobs(setting, f"after-{method.name}", None, seeds, ends)
                for b, t, a in zip(before, tuned, after, strict=True):
                    rows.append(
                        {
                            "dataset": self.dataset,
                            "setting": setting.name,
                            "method": method.name,
                            "seed": b["seed"],
                        }
                        | {f"start_{k}": v for k, v in spread(b["start"]).items()}
                        | {f"end_{k}": v for k, v in spread(t["end"]).items()}
                        | {f"before_{k}": b[k] for k in MEASURES}
                        | {f"tuned_{k}": t[k] for k in MEASURES}
                        | {f"after_{k}": a[k] for k in MEASURES}
                    )
        self.table("sweep", rows)
        return rows

    def axes(self, setting: Setting) -> dict[str, np.ndarray]:
        """The grid's values of its two hyperparameters."""
        n = self.preset.grid
        lines = {"l2": np.geomspace(*L2, n), "input_noise": np.linspace(*NOISE, n)}
        lines["hidden_noise"] = lines["input_noise"]
        return {name: lines[name] for name in setting.hparams}

    def grid(self, setting: Setting) -> list[dict[str, Any]]:
        """Figures 1 and 7: λ fixed at each point of a grid, all with the same split and first weights."""
        points = np.stack(np.meshgrid(*self.axes(setting).values(), indexing="ij"), -1).reshape(-1, 2)
        hparams = [
            setting.filled(dict(zip(setting.hparams, map(float, p), strict=True)), self.images.shape)
            for p in points
        ]
        return self.jobs(setting, "grid", None, [self.seed] * len(points), hparams)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows as CSV, under one heading, empty where a row has no such column."""
        self.out.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(self.out / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def claim(self, figure: str, numbers: dict[str, Any]) -> None:
        """What tests the paper's claim: printed, and kept beside the logs."""
        self.out.mkdir(parents=True, exist_ok=True)
        about = {"preset": self.preset_name, "dataset": self.images.title, "backend": self.ops.name}
        about |= {"poor": True} if self.poor else {}
        (self.out / f"{figure}.json").write_text(json.dumps(about | {"numbers": numbers}, indent=1) + "\n")
        starts = ", poor starts" if self.poor else ""
        print(f"{figure}, {self.images.title}, preset {self.preset_name}{starts}")
        for name, value in numbers.items():
            print(f"  {name}: {value}")


def middle(options: argparse.Namespace) -> argparse.Namespace:
    """The data set between MNIST and CIFAR-10: SVHN where its files are, otherwise Fashion-MNIST."""
    if options.data and options.dataset is None:
        options.dataset = "svhn" if (options.data / "svhn").exists() else "fashion-mnist"
    return options


def deep_runs(lab: Lab) -> dict[str, dict[str, Any]]:
    """Figures 2 and 3: hardly any regularisation at the start, an L2 strength for each layer; by name."""
    layers = lab.settings[0].layers
    setting = Setting("l2-each-" + "-".join(map(str, layers)), layers, ("input_noise", "l2"), False, False)
    start = [setting.filled({"input_noise": 0.05, "l2": 1e-6}, lab.images.shape)]
    found = {}
    for method in (None, *METHODS):
        name = method.name if method else "fixed"
        found |= {
            name: lab.job(
                setting,
                f"over-training-{name}",
                lambda method=method: lab.train(setting, method, [lab.seed], start, lab.preset.points),
            )[0]
        }
    return found


MEASURES = [f"{part}_{kind}" for part in ("test", "val", "train") for kind in ("error", "loss")]


def prepared(start: Any, x: Any) -> Any:
    """Centred and whitened by this start's own T1."""
    x = x - start["centre"]
    return x @ start["whiten"] if "whiten" in start else x


def order(rows: np.ndarray, seed: tuple[int, ...], first: int, steps: int) -> np.ndarray:
    """Which images each step sees: all of them once before any comes again, in a new order each time."""
    an_epoch, batches, epoch = len(rows) // BATCH, [], None
    for t in range(first, first + steps):
        if epoch != t // an_epoch:
            epoch = t // an_epoch
            shuffled = np.random.default_rng((*seed, epoch)).permutation(rows)
        batches.append(shuffled[t % an_epoch * BATCH :][:BATCH])
    return np.stack(batches).astype(np.int32)


def plain(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: (np.asarray(v) + 0.0).tolist() for k, v in tree.items()}  # a clip leaves −0 behind


def numeric(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, np.float32) for k, v in tree.items()}


def spread(tree: dict[str, Any]) -> dict[str, float]:
    """Vectors entry by entry."""
    found = {}
    for name, value in tree.items():
        entries = {name: value} if np.ndim(value) == 0 else {f"{name}_{k}": v for k, v in enumerate(value)}
        found |= entries
    return found


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--data", type=Path, help="folder of the data sets; see data.py")
    parser.add_argument("--dataset", choices=data.NAMES)
    parser.add_argument("--backend", choices=("jax", "torch"), default="jax")
    parser.add_argument("--out", type=Path, default=Path("paper-runs"), help="folder of the logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--poor", action="store_true", help="start figures 4 to 6 from poor λ")
    parser.add_argument("--draw", action="store_true", help="draw from the logs, when it has run")
    return parser.parse_args()
