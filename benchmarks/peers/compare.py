"""hypergrad and the libraries that people use today, on the same problems and the same numbers.

    python -m benchmarks.peers.compare [--peers torchopt higher betty jaxopt optimistix | none]
        [--preset smoke|small] [--only KEY ...] [--out FILE.json]

In one process, interleaved: each round runs every entry of a workload once, in an order of its own, and times
are ratios of medians. A library that is not installed is passed over with a word. README.md says what is
fair about this and how to read the table.
"""

import argparse
import importlib
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy

from benchmarks.peers import ours
from benchmarks.peers.frameworks import Entry, Outcome, Task
from benchmarks.peers.workloads import PRESETS, Workload, error, workloads
from benchmarks.shared.report import plain, save
from benchmarks.shared.timing import Program, rounds
from hypergrad.errors import SolveWarning

PEERS = {  # what is installed -> (framework, what it is imported as)
    "torchopt": ("torch", "torchopt"),
    "higher": ("torch", "higher"),
    "betty-ml": ("torch", "betty"),
    "jaxopt": ("jax", "jaxopt"),
    "optimistix": ("jax", "optimistix"),
}
FRAMEWORKS = ("torch", "jax", "numpy")
RIGHT, WRONG = 1e-4, 1e-2
"""The relative errors up to which a hypergradient is right, in float32 or from a solve to 1e-6, and above
which it is wrong; between them it is imprecise."""
FEWEST, LONGEST = 5, 5.0
"""An entry that has run so often, and for so many seconds, sits out the rounds that remain."""
BEHIND = 0.95
"""A ratio theirs/ours below which we say that we are behind."""


@dataclass
class Row:
    """One entry on one workload, and its outcome."""

    workload: Workload
    framework: str
    entry: Entry
    outcome: Outcome
    program: Program | None = None
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times) if self.times else math.nan

    @property
    def error(self) -> float:
        exact, found = self.workload.exact, self.outcome.value
        return math.nan if exact is None or found is None else error(found, exact)

    @property
    def right(self) -> bool:
        return self.error <= RIGHT

    def as_dict(self, base: "Row | None") -> dict[str, Any]:
        found = {
            "workload": self.workload.key,
            "framework": self.framework,
            "library": self.entry.library,
            "setting": self.entry.setting,
            "error": self.error,
            "apart": apart(self, base),
            "seconds": self.seconds,
            "least_seconds": min(self.times, default=math.nan),
            "bytes": self.outcome.memory,
            "products": self.outcome.products,
            "compile_seconds": self.outcome.compiled if self.framework == "jax" else math.nan,
            "said": self.outcome.said,
        }
        if base is not None:
            found |= {"time_ratio": self.seconds / base.seconds, "memory_ratio": ratio(self, base)}
        return plain(found)


def apart(row: Row, base: Row | None) -> float:
    """How far a value is from that of hypergrad."""
    if base is None or row.outcome.value is None or base.outcome.value is None:
        return math.nan
    return error(row.outcome.value, numpy.asarray(base.outcome.value, numpy.float64))


def ratio(row: Row, base: Row) -> float:
    return row.outcome.memory / base.outcome.memory if base.outcome.memory else math.nan


def look(framework: ModuleType, task: Task, counted: Task, entry: Entry, twin: Entry) -> tuple[Outcome, Any]:
    """Run an entry once, and take what there is without a clock. ``twin`` is it with losses that count."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SolveWarning)
        try:
            begin = time.perf_counter()
            run = framework.program(task, entry)
            compiled = time.perf_counter() - begin
            found = framework.value(run())
        except Exception as raised:  # whatever a library says of a problem is what we want to know
            return Outcome(None, f"raises {type(raised).__name__}: {first_line(raised)}"), None
        memory = products = math.nan
        if task.workload.timed:
            memory = framework.memory(task, entry)
            products = framework.products(counted, twin)
    said = {first_line(w.message) for w in told if issubclass(w.category, SolveWarning)}
    if not numpy.isfinite(found).all():
        said.add("returns NaN" if numpy.isnan(found).any() else "returns infinity")
    return Outcome(found, "; ".join(sorted(said)), memory, products, compiled), run


def first_line(message: Any) -> str:
    """The first line, or that of the error inside a callback of a compiled program."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip() and "---" not in line]
    inside = [line for line in lines[1:] if "RuntimeError: " in line]
    return (inside or lines or [""])[0]


def entries(framework: ModuleType, task: Task, peers: list[ModuleType]) -> list[Entry]:
    return [
        *ours.entries(task, compiled=framework.NAME == "jax"),
        *framework.by_hand(task),
        *(e for peer in peers for e in peer.entries(task)),
    ]


def compare(workload: Workload, framework: ModuleType, peers: list[ModuleType], repeats: int) -> list[Row]:
    task = Task.of(workload, framework.WORDS)
    counted = framework.counting(task)
    rows = []
    pairs = zip(entries(framework, task, peers), entries(framework, counted, peers), strict=True)
    for entry, twin in pairs:
        outcome, run = look(framework, task, counted, entry, twin)
        rows.append(Row(workload, framework.NAME, entry, outcome, run))
    if workload.timed:
        going = [row for row in rows if row.program is not None]
        times = rounds([row.program for row in going], repeats, framework.wait, enough)
        for row, seconds in zip(going, times, strict=True):
            row.times = seconds
    return rows


def enough(times: list[float]) -> bool:
    return len(times) >= FEWEST and sum(times) > LONGEST


def base_of(rows: list[Row]) -> Row | None:
    """What others are compared with: the first entry of hypergrad that is right."""
    mine = [row for row in rows if row.entry.library == "hypergrad" and row.outcome.value is not None]
    return next((row for row in mine if row.right), None)


MEASURES = {
    "time": lambda row: row.seconds,
    "memory": lambda row: row.outcome.memory,
    "products": lambda row: row.outcome.products,
}


def lags(row: Row, rows: list[Row]) -> Iterator[tuple[str, float, Row]]:
    """In what a right answer of another's beats the best of ours, by how much, and which that is."""
    mine = [mine for mine in rows if mine.entry.library == "hypergrad" and mine.right and mine.times]
    if not mine or not row.right or row.entry.library == "hypergrad":
        return
    for name, of in MEASURES.items():
        best = min(mine, key=of)
        if of(row) < BEHIND * of(best):
            yield name, of(row) / of(best), best


def behind(rows: list[Row]) -> Iterator[str]:
    where = f"{rows[0].workload.title}, {rows[0].framework}"
    for name in MEASURES:
        for row in rows:
            for measure, ratio, best in lags(row, rows):
                if measure == name:
                    yield (
                        f"{where}: {row.entry.library} ({row.entry.setting.strip()}) has {ratio:.2f} of the "
                        f"{name} of our best ({best.entry.setting})"
                    )


def wrong(rows: list[Row]) -> Iterator[str]:
    """The numbers of those who are wrong, beside the right ones."""
    with numpy.printoptions(precision=4, threshold=4, edgeitems=2):
        for row in rows:
            if row.outcome.value is not None and row.error > WRONG:
                yield f"  {row.entry.library} ({row.entry.setting}) says {row.outcome.value}"
        if any(row.error > WRONG for row in rows):
            yield f"  right is {rows[0].workload.exact}\n"


def agreement(bases: dict[str, list[Row]]) -> Iterator[str]:
    """How far hypergrad's backends are from one another."""
    for title, rows in bases.items():
        if len(rows) > 1:
            largest = max(apart(a, b) for a in rows for b in rows)
            yield f"{title}: hypergrad on {', '.join(row.framework for row in rows)} agrees to {largest:.0e}"


# The table


COLUMNS = ["library", "setting", "error", "from ours", "time", "× ours", "memory", "× ours", "products", ""]


def cells(row: Row, base: Row | None, rows: list[Row]) -> list[str]:
    def number(value: float, form: str) -> str:
        return "" if not math.isfinite(value) else format(value, form)

    seconds, memory = row.seconds, row.outcome.memory
    times = row.seconds / base.seconds if base is not None else math.nan
    sizes = ratio(row, base) if base is not None else math.nan
    return [
        row.entry.library,
        row.entry.setting,
        number(row.error, ".0e"),
        "" if row is base else number(apart(row, base), ".0e"),
        number(1e3 * seconds, ".3g") + (" ms" if math.isfinite(seconds) else ""),
        number(times, ".2f"),
        number(memory / 1e6, ".3g") + (" MB" if math.isfinite(memory) else ""),
        number(sizes, ".2f"),
        number(row.outcome.products, "g"),
        verdict(row, rows),
    ]


def verdict(row: Row, rows: list[Row]) -> str:
    said = row.outcome.said
    if row.outcome.value is not None and row.workload.exact is not None and not row.right:
        grade = "WRONG" if not row.error <= WRONG else "imprecise"
        said = f"{grade}; {said}" if said else f"{grade}, silently"
    if row.outcome.value is not None and row.workload.exact is None and not said:
        said = "returns numbers, silently"
    if row.workload.key == "saddle" and row.right and row.entry.library != "hypergrad" and not said:
        said = "right; does not say that it is no minimum"
    if found := [name for name, _, _ in lags(row, rows)]:
        said = "; ".join(filter(None, [said, "we are behind in " + ", ".join(found)]))
    return said


def exact_of(workload: Workload) -> str:
    if workload.exact is None:
        return workload.note
    with numpy.printoptions(precision=6, threshold=4, edgeitems=2):
        return "exact, in float64: " + str(workload.exact) + (f"; {workload.note}" if workload.note else "")


def show(title: str, subtitle: str, table: list[list[str]]) -> None:
    if importlib.util.find_spec("rich") is None:
        widths = [max(len(line[k]) for line in [COLUMNS, *table]) for k in range(len(COLUMNS) - 1)]
        print(f"\n{title}\n  {subtitle}")
        for line in [COLUMNS, *table]:
            print(
                "  "
                + "  ".join([f"{c:{w}}" for c, w in zip(line, widths, strict=False)] + line[-1:]).rstrip()
            )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    shown = Table(title=f"{title}\n{subtitle}", title_justify="left", title_style="bold", box=None)
    for k, name in enumerate(COLUMNS):
        shown.add_column(name, justify="right" if 2 <= k <= 8 else "left", no_wrap=k < 9)
    for line in table:
        shown.add_row(*line, style="bold" if line[0] == "hypergrad" else None)
    console.print(shown)
    console.print()


def installed(names: list[str]) -> tuple[dict[str, list[ModuleType]], dict[str, str], list[str]]:
    """The adaptors of each framework, the versions found, and what is passed over, with the reason."""
    adaptors: dict[str, list[ModuleType]] = {name: [] for name in FRAMEWORKS}
    versions, passed = {}, []
    for name in names:
        framework, imported = PEERS[name]
        if importlib.util.find_spec(imported) is None:
            passed.append(f"{name} is not installed: pip install -r benchmarks/peers/requirements-{name}.txt")
            continue
        try:
            adaptors[framework].append(importlib.import_module(f"benchmarks.peers.peer_{imported}"))
        except Exception as raised:  # an old library on a new framework
            passed.append(f"{name} is installed and cannot be imported: {first_line(raised)}")
            continue
        versions[name] = version(name)
    return adaptors, versions, passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "none"], default=list(PEERS))
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--only", nargs="+", help="keys of workloads, such as unroll or ridge-1e3")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = [] if "none" in options.peers else options.peers
    adaptors, versions, passed = installed(names)
    for line in passed:
        print(f"passed over: {line}")
    frameworks = []
    for name in options.frameworks:
        if importlib.util.find_spec(name) is None:
            print(f"passed over: {name} is not installed, nor what runs on it")
        else:
            frameworks.append(importlib.import_module(f"benchmarks.peers.in_{name}"))
    versions = (
        {"python": platform.python_version(), "numpy": numpy.__version__}
        | {k: v for module in frameworks for k, v in module.versions().items()}
        | versions
    )
    about = {"preset": options.preset, "machine": platform.machine(), "versions": versions}
    print(", ".join(f"{k} {v}" for k, v in versions.items()))

    load = [os.getloadavg()[0]]
    repeats = options.repeats or PRESETS[options.preset]["repeats"]
    kept, lags = [], []
    bases: dict[str, list[Row]] = {}
    for workload in workloads(options.preset):
        if options.only and workload.key not in options.only:
            continue
        for framework in frameworks:
            rows = compare(workload, framework, adaptors[framework.NAME], repeats)
            base = base_of(rows)
            show(
                f"{workload.title}, {framework.NAME}",
                exact_of(workload),
                [cells(row, base, rows) for row in rows],
            )
            kept += [row.as_dict(base) for row in rows]
            lags += behind(rows)
            if base is not None:
                bases.setdefault(workload.title, []).append(base)
            for line in wrong(rows):
                print(line)
            if workload.exact is not None and base is None and workload.timed:
                raise SystemExit(f"hypergrad is wrong on {workload.key} in {framework.NAME}")
    for line in agreement(bases):
        print(line)
    print("Where hypergrad is behind:" if lags else "Nowhere is hypergrad behind.")
    for line in lags:
        print(f"  {line}")
    load.append(os.getloadavg()[0])
    print(f"load of the machine before and after: {load[0]:.1f}, {load[1]:.1f} ({os.cpu_count()} cores)")
    if options.out:
        save(options.out, about | {"load": load, "rows": kept, "behind": lags})


if __name__ == "__main__":
    main()
