"""What a hypergradient costs, in training gradients: FLOPs, interleaved time and memory against targets.

    python benchmarks/cost.py --backend torch|jax [--width 1000] [--batch 100] [--compiled] [--out FILE.json]

The unit g is one training gradient, forward and backward, of the same loss on the same batch in the same
process. FLOPs repeat to the digit: torch's are those of matrix products, JAX's are what XLA counts of the
compiled program, elementwise work included. Times are ratios of medians, each
round measuring the baseline and all candidates in an order of its own. Use widths of 384 and more: smaller
nets measure the interpreter. The net is an MLP 784-3×width-10 with ReLU.
"""

import argparse
import importlib
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

Program = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A program, how many gradients it is compared with, and what is asked of it (in g of each kind)."""

    name: str
    program: Program
    unit: Program
    per: float = 1.0
    less: float = 0.0
    flops: float | None = None
    seconds: float | None = None
    counted: bool = True


@dataclass(frozen=True)
class Figure:
    """A number that is there without a clock, and what is asked of it."""

    name: str
    value: float
    sense: str
    target: float | None

    def __str__(self) -> str:
        if self.target is None:
            return f"{self.name:68} {self.value:8.3f}"
        held = self.value <= self.target if self.sense == "≤" else self.value >= self.target
        return f"{self.name:68} {self.value:8.3f} {self.sense} {self.target:g}{'' if held else ' ✗'}"


@dataclass
class Measured:
    """What was seen of a row."""

    row: Row
    flops: float = float("nan")
    times: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Ratio of the medians."""
        ratio = statistics.median(self.times) / statistics.median(self.units)
        return (ratio - self.row.less) / self.row.per

    def as_dict(self) -> dict[str, Any]:
        targets = {"flops_target": self.row.flops, "seconds_target": self.row.seconds}
        return {"name": self.row.name, "flops": self.flops, "seconds": self.seconds, **targets}


def measure(rows: list[Row], suite: Any, repeats: int) -> list[Measured]:
    """FLOPs once, and times interleaved, in another order each round: A B C … B C A …"""
    results = [Measured(row) for row in rows]
    for result in results:
        row = result.row
        if not row.counted:
            continue
        result.flops = (suite.flops(row.program) / suite.flops(row.unit) - row.less) / row.per
    programs = list({id(program): program for row in rows for program in (row.program, row.unit)}.values())
    for program in programs:
        program()
    order = random.Random(0)
    for _ in range(repeats):
        # What ran before leaves its traces in caches and in the allocator.
        order.shuffle(programs)
        once = {id(program): clock(program, suite) for program in programs}
        for result in results:
            result.times.append(once[id(result.row.program)])
            result.units.append(once[id(result.row.unit)])
    return results


def clock(program: Program, suite: Any) -> float:
    begin = time.perf_counter()
    suite.wait(program())
    return time.perf_counter() - begin


def show(results: list[Measured]) -> None:
    def against(value: float, target: float | None) -> str:
        mark = "" if target is None else f" ≤ {target:<5.4g}" + (" " if value <= target else "✗")
        return f"{value:8.3f}{mark:9}"

    print(f"{'':76} {'FLOPs':>8} {'target':8} {'time':>8} {'target':8}")
    for result in results:
        row, time = result.row, against(result.seconds, result.row.seconds)
        print(f"{row.name:76} {against(result.flops, row.flops)} {time}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--compiled", action="store_true", help="compiled estimates too: a minute each to make"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    suite = importlib.import_module(f"cost_{options.backend}")
    rows = suite.rows(options.width, options.batch, options.compiled)
    rows = [row for row in rows if options.only in row.name]
    about = {"backend": options.backend, "width": options.width, "batch": options.batch}
    about |= {"machine": platform.machine(), "versions": suite.versions()}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = measure(rows, suite, options.repeats)
    show(results)
    figures = [] if options.only else getattr(suite, "figures", lambda *_: [])(options.width, options.batch)
    for figure in figures:
        print(figure)
    if options.out:
        kept = {**about, "rows": [r.as_dict() for r in results], "figures": [asdict(f) for f in figures]}
        options.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
