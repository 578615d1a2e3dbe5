"""The lab trains a setting from many starts, by a method or with λ fixed, and measures where it ends."""

from __future__ import annotations

import argparse
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

import hypergrad as hg
from benchmarks.paper import data
from benchmarks.paper.data import BATCH
from benchmarks.paper.frameworks import framework
from benchmarks.paper.logs import Logs, Record, numeric, plain
from benchmarks.paper.methods import FIRST, ByName, Method, annealed_adam
from benchmarks.paper.presets import PRESETS, preset_for
from benchmarks.paper.settings import Setting, settings
from benchmarks.shared.networks import cross_entropies

EVERY = 10
"""Steps of θ for one of λ."""
ROWS = 200
"""At most so many rows of a run's hyperparameters are kept."""


class Lab:
    """A data set, a framework and a preset."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.preset_name = options.preset
        default = PRESETS[options.preset].dataset if options.data else "digits"
        self.dataset = options.dataset or default
        self.preset = preset_for(options.preset, self.dataset)
        self.ops, self.data_folder, self.seed = framework(options.backend), options.data, options.seed
        self.poor = options.poor
        self.out = options.out / options.preset / (self.dataset + ("-poor" if self.poor else ""))
        self.total = self.preset.epochs * (self.preset.size[0] // BATCH) // EVERY * EVERY

    @cached_property
    def images(self) -> data.Images:
        return data.load(self.dataset, self.data_folder)

    @cached_property
    def shared(self) -> dict[str, Any]:
        images, array = self.images, self.ops.array
        labels = {"y": images.y.astype(np.int32), "y_test": images.y_test.astype(np.int32)}
        return {"x": array(images.x), "x_test": array(images.x_test)} | {
            k: array(v) for k, v in labels.items()
        }

    @cached_property
    def settings(self) -> list[Setting]:
        return settings(self.preset, self.dataset)

    @cached_property
    def logs(self) -> Logs:
        about = {
            "preset": self.preset_name,
            "dataset": self.images.title,
            "backend": self.ops.name,
            "T1": self.preset.size[0],
            "T2": self.preset.size[1],
            "epochs": self.preset.epochs,
            "steps": self.total,
            "travel": self.preset.travel,
            "seed": self.seed,
        }
        return Logs(self.out, about | ({"poor": True} if self.poor else {}))

    def tuner(self, setting: Setting, method: Method | None, every: int = EVERY) -> hg.Tuner:
        """With λ fixed it is a tuner whose turn to move λ never comes."""
        update = annealed_adam(2e-3 if setting.convolutional else 1e-3, self.total)
        problem = setting.net(self.images.shape).bilevel(self.ops, own=method is not None and method.own)
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
            return data.prepared(start, shared["x"][rows]), ops.one_hot(shared["y"][rows])

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
                part, labels = data.prepared(start, x[k : k + piece]), y[k : k + piece]
                logits, _ = net.logits(ops, inner.params, part, inner.aux)
                loss = loss + ops.xp.sum(cross_entropies(ops.xp, logits, ops.one_hot(labels)))
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
    ) -> list[Record]:
        """One record for each start: its hyperparameters, how they moved, and errors at ``points`` places."""
        ops, net, tuner = self.ops, setting.net(self.images.shape), self.tuner(setting, method)
        splits = {seed: data.split(self.images, *self.preset.size, seed) for seed in set(seeds)}
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
            measures = ops.rows(judge(ops.paired(given, ops.each(states, "inner")), self.shared))
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

    def _own(self, split: data.Split, seed: int, first: int, steps: int) -> dict[str, Any]:
        """What differs between starts: the preprocessing, and which images come when."""
        t1, t2 = split.t1, split.t2
        return {
            "centre": split.centre,
            "whiten": split.whiten,
            "t1": t1[: len(t2)].astype(np.int32),
            "t2": t2.astype(np.int32),
            "order1": data.order(t1, (self.seed, seed, 3), first, steps),
            "order2": data.order(t2, (self.seed, seed, 4), first // EVERY, steps // EVERY),
        }

    def jobs(
        self, setting: Setting, name: str, method: Method | None, seeds: list[int], hparams: list[Any]
    ) -> list[Record]:
        """Records of many starts, a file for each chunk of them."""
        runs, size = [], self.preset.chunk
        for k in range(0, len(seeds), size):
            part = slice(k, k + size)
            runs += self.logs.job(
                setting,
                f"{name}-{k:03d}",
                lambda part=part: self.train(setting, method, seeds[part], hparams[part]),
            )
        return runs

    def again(self, setting: Setting, name: str, seeds: list[int], runs: list[Record]) -> list[Record]:
        """Records of training with λ fixed where these runs ended."""
        return self.jobs(setting, name, None, seeds, [numeric(run["end"]) for run in runs])
