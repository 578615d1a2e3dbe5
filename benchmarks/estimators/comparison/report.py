"""Tables and pictures of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimators.comparison.race import by, final
from benchmarks.shared import report

Result = dict[str, Any]

HEADINGS = {
    "area": ("area under ROC", 1, "{:.3f}"),
    "test_error": ("test error, %", 100, "{:.2f}"),
    "test_loss": ("test loss", 1, "{:.4f}"),
}
"""By what is measured on examples that nothing has seen, the first that there is."""


def mean(values: list[float], form: str = "{:.4f}") -> str:
    """Over seeds."""
    failed = np.count_nonzero(~np.isfinite(values))
    return f"{failed} of {len(values)} failed" if failed else form.format(np.mean(values))


def paired(values: list[float], others: list[float]) -> str:
    """Mean difference ± its standard error; a seed has the same data and the same runs for all methods."""
    gap = np.subtract(values, others)
    if not np.isfinite(gap).all() or not gap.any():
        return ""
    error = f" ± {gap.std(ddof=1) / len(gap) ** 0.5:.4f}" if len(gap) > 1 else ""
    return f"{gap.mean():+.4f}{error}"


def along(path: list[dict[str, Any]], name: str, form: str) -> str:
    """First and last of a run."""
    if not path or "fault" in path[-1]:
        return path[-1]["fault"] if path else ""
    ends = [path[0], path[-1]] if len(path) > 1 else path
    return " … ".join(form.format(row[name]) for row in ends)


def rows(results: dict[str, Result]) -> list[dict[str, str]]:
    """A row for each method, as it is printed."""
    (first, result), *others = results.items()
    methods, bias = result["methods"], result.get("bias", {})
    begin = [seed["curve"][0] for seed in next(iter(methods.values()))["seeds"]]
    measured = next(name for name in HEADINGS if name in begin[0])
    heading, scale, form = HEADINGS[measured]
    losses = {name: [final(seed) for seed in record["seeds"]] for name, record in methods.items()}
    best = min(losses.values(), key=np.mean)
    start = {"method": "where all begin", "loss": mean([row["val_loss"] for row in begin])}
    found = [start | {heading: mean([scale * row[measured] for row in begin], form)}]
    for name, record in methods.items():
        seeds, path = record["seeds"], bias.get(name, [])
        ends = [seed["curve"][-1] for seed in seeds]
        row = {
            "method": name,
            "rate": f"{seeds[0]['rate']:.2g}" if record["tried"] else "",
            "loss": mean(losses[name]),
            "above the best": paired(losses[name], best),
            "for half": mean([by(seed, result["budget"] / 2) for seed in seeds]),
            heading: mean([scale * final(seed, measured) for seed in seeds], form),
            "gradients": f"{np.mean([end['gradients'] for end in ends]):.0f}",
            "held, MB": f"{seeds[0]['bytes_held'] / 1e6:.2f}" if seeds[0]["bytes_held"] else "",
            "cosine": along(path, "cosine", "{:.2f}"),
            "error": along(path, "relative_error", "{:.1g}"),
            f"{first}, s": f"{np.mean([end['seconds'] for end in ends]):.1f}",
        }
        for other, theirs in others:
            row[f"{other}, s"] = f"{theirs['methods'][name]['seeds'][0]['curve'][-1]['seconds']:.1f}"
        found.append(row)
    return found


def agreement(results: dict[str, Result]) -> str:
    """How far the losses of other backends are from the first one's, on the first seed."""
    (first, result), *others = results.items()
    found = []
    for name, other in others:
        pairs = [
            (final(record["seeds"][0]), final(other["methods"][method]["seeds"][0]))
            for method, record in result["methods"].items()
        ]
        gaps = [abs(a - b) / abs(a) for a, b in pairs if np.isfinite([a, b]).all()]
        found.append(f"{name} {np.median(gaps):.1%}, at most {max(gaps):.1%}")
    return f"Losses differ from {first}'s on one seed: {'; '.join(found)}." if found else ""


def markdown(results: dict[str, Result]) -> str:
    """The table for a README."""
    found = rows(results)
    names = [*dict.fromkeys(key for row in found for key in row)]
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def show(results: dict[str, Result]) -> None:
    """Print the table."""
    result, found = next(iter(results.values())), rows(results)
    names = [*dict.fromkeys(key for row in found for key in row)]
    cells = [[row.get(name, "") for name in names] for row in found]
    report.show(f"{result['title']}; {result['data']}", names, cells, 190, agreement(results))


def average(seeds: list[Result], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss over seeds against what was spent: after so much, each has what it had found last."""
    spent = [np.array([row[column] for row in seed["curve"]]) for seed in seeds]
    losses = [np.array([row["val_loss"] for row in seed["curve"]]) for seed in seeds]
    at = np.unique(np.concatenate(spent))
    held = [own[np.searchsorted(x, at, "right") - 1] for x, own in zip(spent, losses, strict=True)]
    return at, np.mean(held, axis=0)


def draw(path: Path, results: dict[str, Result]) -> None:
    """Loss on T2 against gradients and against seconds; cosine and error of the hypergradient over a run."""
    from matplotlib.figure import Figure

    result = next(iter(results.values()))
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    gradients, seconds, cosine, error = figure.subplots(1, 4)
    lowest, highest = np.inf, -np.inf
    for i, (name, record) in enumerate(result["methods"].items()):
        style = {"color": f"C{i}", "ls": "-" if record["tried"] else "--", "lw": 1.4}
        for axes, column in ((gradients, "gradients"), (seconds, "seconds")):
            at, losses = average(record["seeds"], column)
            axes.step(at, losses, where="post", label=name, **style)
            lowest, highest = min(lowest, np.nanmin(losses)), max(highest, losses[0])
        bias = [row for row in result.get("bias", {}).get(name, []) if "fault" not in row]
        if bias:
            at = [row["step"] for row in bias]
            cosine.plot(at, [row["cosine"] for row in bias], marker=".", **style)
            error.plot(at, [row["relative_error"] for row in bias], marker=".", **style)
    for axes, label in ((gradients, "gradients spent"), (seconds, "seconds")):
        # What is worse than the start is not worth the room.
        margin = 0.05 * (highest - lowest) or 1e-3
        limits = lowest - margin, highest + margin
        axes.set(xlabel=label, ylabel="validation loss, models trained anew", ylim=limits)
    cosine.set(xlabel="training step", ylabel="cosine with the exact hypergradient")
    error.set(xlabel="training step", ylabel="relative error", yscale="log")
    figure.legend(*gradients.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(result["title"], fontsize=10)
    figure.savefig(path, dpi=80)
