"""What became of the mutants: the score, its interval, and those that live."""

import csv
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

from tests.mutants.draw import folder_of

REASONS = Path(__file__).with_name("reasons.csv")


class Fate(NamedTuple):
    """One mutant that was tried."""

    item: WorkItem
    result: WorkResult

    @property
    def lives(self) -> bool:
        return self.result.test_outcome is TestOutcome.SURVIVED

    @property
    def name(self) -> str:
        """Return a name that outlives edits elsewhere in the module."""
        (mutation,) = self.item.mutations
        removed = next((line[1:].strip() for line in self.changes if line[0] == "-" and line[1:].strip()), "")
        return f"{mutation.module_path}: {mutation.operator_name.split('/')[1]}: {removed}"

    @property
    def changes(self) -> list[str]:
        lines = (self.result.diff or "").splitlines()
        return [line for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---"))]


def fates(work: WorkDB) -> list[Fate]:
    """Return the mutants that ran."""
    results = dict(work.results)
    ran = (Fate(item, results[item.job_id]) for item in work.work_items if item.job_id in results)
    return [fate for fate in ran if fate.result.worker_outcome is WorkerOutcome.NORMAL]


def interval(killed: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of 95 % for a share."""
    share, extent = killed / tried, 1 + z * z / tried
    middle = (share + z * z / (2 * tried)) / extent
    half = z / extent * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried))
    return middle - half, middle + half


def reasons() -> dict[str, str]:
    """Return why a mutant lives, by its name."""
    with REASONS.open(newline="") as file:
        return {row["mutant"]: row["reason"] for row in csv.DictReader(file)}


def report(work: WorkDB, sizes: dict[str, int]) -> str:
    """Return the table and the survivors, each with its reason, in Markdown."""
    by_folder = defaultdict(Counter)
    tried = fates(work)
    for fate in tried:
        by_folder[folder_of(fate.item)]["lives" if fate.lives else "killed"] += 1
    rows = [
        "| folder | mutants | tried | killed | score | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, total, count in [
        *((name, sizes[name], by_folder[name]) for name in sizes),
        ("all", sum(sizes.values()), sum(by_folder.values(), Counter())),
    ]:
        if count.total():
            low, high = interval(count["killed"], count.total())
            cells = [name, f"{total:,}", count.total(), count["killed"]]
            cells += [f"{count['killed'] / count.total():.1%}", f"{low:.1%} to {high:.1%}"]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    why = reasons()
    living = [
        f"### {fate.name}\n\n{why.get(fate.name, 'No reason known.')}\n\n```diff\n"
        + "\n".join(fate.changes)
        + "\n```"
        for fate in tried
        if fate.lives
    ]
    return "\n".join(rows) + "\n\n" + "\n\n".join(living) + "\n"
