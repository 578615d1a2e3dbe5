"""The sweep of figures 4 to 6: from random starts, λ fixed before, tuned by each method, fixed after."""

from __future__ import annotations

from benchmarks.paper.claims import grouped
from benchmarks.paper.lab import Lab
from benchmarks.paper.logs import Record, spread

MEASURES = [f"{part}_{kind}" for part in ("test", "val", "train") for kind in ("error", "loss")]


def sweep(lab: Lab) -> list[Record]:
    """A row for each start and method, which are the table of these figures."""
    rows = []
    seeds = [lab.seed + k for k in range(lab.preset.starts)]
    for setting in lab.settings:
        starts = [setting.random(seed, lab.images.shape, lab.poor) for seed in seeds]
        before = lab.jobs(setting, "before", None, seeds, starts)
        for method in lab.preset.methods:
            tuned = lab.jobs(setting, f"tuned-{method.name}", method, seeds, starts)
            after = lab.again(setting, f"after-{method.name}", seeds, tuned)
            for b, t, a in zip(before, tuned, after, strict=True):
                about = {"dataset": lab.dataset, "setting": setting.name, "method": method.name}
                rows.append(
                    about
                    | {"seed": b["seed"]}
                    | {f"start_{k}": v for k, v in spread(b["start"]).items()}
                    | {f"end_{k}": v for k, v in spread(t["end"]).items()}
                    | {f"before_{k}": b[k] for k in MEASURES}
                    | {f"tuned_{k}": t[k] for k in MEASURES}
                    | {f"after_{k}": a[k] for k in MEASURES}
                )
    lab.logs.table("sweep", rows)
    return rows


def groups(rows: list[Record]) -> dict[str, list[Record]]:
    """By setting and method, and all settings of a method together."""
    together = {f"all settings, {method}": part for method, part in grouped(rows, "method").items()}
    return grouped(rows, "setting", "method") | together
