"""A row of the table of costs: programs, the unit that they are compared with, and what was measured."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.shared.timing import Program, rounds


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


def measure(rows: list[Row], net: Any, repeats: int) -> list[Measured]:
    """FLOPs once, as the module ``net`` counts them, and times interleaved."""
    results = [Measured(row) for row in rows]
    for result in results:
        row = result.row
        if not row.counted:
            continue
        result.flops = (net.flops(row.program) / net.flops(row.unit) - row.less) / row.per
    programs = {id(program): program for row in rows for program in (row.program, row.unit)}
    for program in programs.values():
        program()
    times = dict(zip(programs, rounds([*programs.values()], repeats, net.wait), strict=True))
    for result in results:
        result.times, result.units = times[id(result.row.program)], times[id(result.row.unit)]
    return results
