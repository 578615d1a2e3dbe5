"""Logs: JSON of each job and of each claim, CSV of each figure; written as it trains, read to draw.

A job whose file is there is not run again, so what was interrupted is resumed by the same command.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.settings import Setting

Record = dict[str, Any]


@dataclass(frozen=True)
class Logs:
    """A folder, and what all runs in it have in common."""

    folder: Path
    about: Record

    def job(self, setting: Setting, name: str, make: Callable[[], list[Record]]) -> list[Record]:
        """Records of a job, from its file if it is there."""
        path = self.folder / setting.name / f"{name}.json"
        about = json.loads(json.dumps(self.about | {"setting": asdict(setting)}))
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

    def table(self, name: str, rows: list[Record]) -> None:
        """Rows as CSV, under one heading, empty where a row has no such column."""
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(self.folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def claim(self, figure: str, numbers: dict[str, str]) -> None:
        """What tests the paper's claim: printed, and kept beside the logs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {k: v for k, v in self.about.items() if k in ("preset", "dataset", "backend", "poor")}
        path = self.folder / f"{figure}.json"
        path.write_text(json.dumps(about | {"numbers": numbers}, indent=1) + "\n")
        starts = ", poor starts" if "poor" in about else ""
        print(f"{figure}, {about['dataset']}, preset {about['preset']}{starts}")
        for name, value in numbers.items():
            print(f"  {name}: {value}")


def table(folder: Path, name: str) -> list[Record]:
    """The rows of a figure, as `Logs.table` left them."""
    with open(folder / f"{name}.csv", newline="") as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def title(folder: Path, figure: str) -> str:
    """The data set and the preset of a figure, as `Logs.claim` left them."""
    about = json.loads((folder / f"{figure}.json").read_text())
    return f"{about['dataset']}, preset {about['preset']}"


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def runs(folder: Path, setting: str, name: str) -> list[Record]:
    """Records of a job, in all of its files."""
    found = []
    for path in sorted((folder / setting).glob(f"{name}-[0-9][0-9][0-9].json")):
        found += json.loads(path.read_text())["runs"]
    return found


def grids(folder: Path) -> Iterator[tuple[str, list[str], list[Record]]]:
    """By setting: the names of its hyperparameters, and the runs of its grid."""
    for path in sorted(folder.glob("*/grid-000.json")):
        hparams = json.loads(path.read_text())["about"]["setting"]["hparams"]
        yield path.parent.name, hparams, runs(folder, path.parent.name, "grid")


def plain(tree: Record) -> Record:
    """Arrays as JSON has them."""
    return {k: (np.asarray(v) + 0.0).tolist() for k, v in tree.items()}  # a clip leaves −0 behind


def numeric(tree: Record) -> dict[str, np.ndarray]:
    """What was `plain` as arrays."""
    return {k: np.asarray(v, np.float32) for k, v in tree.items()}


def spread(tree: Record) -> Record:
    """Vectors entry by entry, as the columns of a table."""
    found = {}
    for name, value in tree.items():
        entries = {name: value} if np.ndim(value) == 0 else {f"{name}_{k}": v for k, v in enumerate(value)}
        found |= entries
    return found
