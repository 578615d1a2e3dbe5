"""Tables and pictures of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from comparison.race import final

Result = dict[str, Any]


def spread(values: list[float], form: str = "{:.4f}") -> str:
    """Mean ± standard error over seeds."""
    if not np.isfinite(values).all():
        return "failed"
    mean = form.format(np.mean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ± {form.format(np.std(values, ddof=1) / len(values) ** 0.5)}"


def halfway(record: Result) -> float:
    """The loss on T2 for half of what was spent."""
    curve = record["curve"]
    return next(row for row in reversed(curve) if row["gradients"] <= curve[-1]["gradients"] / 2)["val_loss"]


def rows(result: Result) -> list[dict[str, str]]:
    """A row for each method, as it is printed."""
    found, bias = [], result.get("bias", {})
    curves = [record["seeds"] for record in result["methods"].values()]
    error = next((k for k in ("area", "test_error") if k in curves[0][0]["curve"][-1]), "test_loss")
    start = [record["curve"][0] for record in curves[0]]
    heading = {"area": "area under ROC", "test_error": "test error, %", "test_loss": "test loss"}[error]
    scale, form = (100, "{:.2f}") if error == "test_error" else (1, "{:.4f}")
    found.append(
        {
            "method": "where all begin",
            "loss on T2": spread([row["val_loss"] for row in start]),
            heading: spread([scale * row[error] for row in start], form),
        }
    )
    for name, record in result["methods"].items():
        seeds, path = record["seeds"], bias.get(name, [])
        found.append(
            {
                "method": name,
                "rate": f"{seeds[0]['rate']:.2g}" if record["tried"] else "",
                "loss on T2": spread([final(seed) for seed in seeds]),
                "at half": spread([halfway(seed) for seed in seeds]),
                heading: spread([scale * final(seed, error) for seed in seeds], form),
                "gradients": f"{np.mean([seed['curve'][-1]['gradients'] for seed in seeds]):.0f}",
                "seconds": f"{np.mean([seed['curve'][-1]['seconds'] for seed in seeds]):.1f}",
                "MB": f"{seeds[0]['bytes_held'] / 1e6:.2f}" if seeds[0]["bytes_held"] else "",
                "cosine": " … ".join(f"{path[k]['cosine']:.2f}" for k in (0, -1)) if path else "",
                "error": " … ".join(f"{path[k]['relative_error']:.2g}" for k in (0, -1)) if path else "",
            }
        )
    return found


def show(results: dict[str, Result]) -> None:
    """Print a table: all columns for the first backend, seconds and losses for the others."""
    from rich.console import Console
    from rich.table import Table

    (first, result), *others = results.items()
    table = Table(title=f"{result['title']}; {first}")
    found = rows(result)
    names = [*dict.fromkeys(key for row in found for key in row), *(name for name, _ in others)]
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in found:
        for name, other in others:
            if (record := other["methods"].get(row["method"])) is not None:
                last = record["seeds"][0]["curve"][-1]
                row[name] = f"{last['val_loss']:.4f}, {last['seconds']:.1f} s"
        table.add_row(*(row.get(name, "") for name in names))
    Console(width=190).print(table)


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
        if bias := result.get("bias", {}).get(name):
            at = [row["step"] for row in bias]
            cosine.plot(at, [row["cosine"] for row in bias], marker=".", **style)
            error.plot(at, [row["relative_error"] for row in bias], marker=".", **style)
    for axes, label in ((gradients, "gradients spent"), (seconds, "seconds")):
        # What is worse than the start is not worth the room.
        margin = 0.05 * (highest - lowest)
        limits = lowest - margin, highest + margin
        axes.set(xlabel=label, ylabel="loss on T2, models trained anew", ylim=limits)
    cosine.set(xlabel="training step", ylabel="cosine with the exact hypergradient")
    error.set(xlabel="training step", ylabel="relative error", yscale="log")
    figure.legend(*gradients.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(result["title"], fontsize=10)
    figure.savefig(path, dpi=80)
