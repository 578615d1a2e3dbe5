"""The figures, drawn from the logs alone.

    python benchmarks/paper/plots.py [--out FOLDER]

draws every figure whose logs lie under the folder, beside them. ``--draw`` of a figure's script does so
for that one.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

COLOURS = {
    "code-clipped": "tab:blue",
    "code-positive": "tab:orange",
    "exact-clipped": "tab:green",
    "exact-positive": "tab:red",
    "fixed": "black",
}
LABELS = {
    "input_noise": "input noise",
    "hidden_noise": "hidden noise",
    "l2": "L2",
}
SIZE = 4.2


def table(folder, name):
    with open(folder / f"{name}.csv", newline="") as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def runs(folder, setting, name):
    """Records of a job, in all of its files."""
    found = []
    for path in sorted((folder / setting).glob(f"{name}-[0-9][0-9][0-9].json")):
        found += json.loads(path.read_text())["runs"]
    return found


def canvas(columns, rows=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE * columns, SIZE * 0.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def grids(folder):
    """By setting: the names of its hyperparameters, and the runs of its grid."""
    paths = sorted(folder.glob("*/grid-000.json"))
    for path in paths:
        found = runs(folder, path.parent.name, "grid")
        yield path.parent.name, json.loads(path.read_text())["about"]["setting"]["hparams"], found


def shade(axes, names, found, kind, log):
    """A heat map of a grid."""
    lines = [np.unique([np.mean(run["start"][name]) for run in found]) for name in names]
    values = np.full([len(line) for line in lines], np.nan)
    for run in found:
        at = [
            int(np.argmin(np.abs(line - np.mean(run["start"][n]))))
            for n, line in zip(names, lines, strict=True)
        ]
        values[tuple(at)] = run[kind]
    shown = np.log10(values) if log else 100 * values
    image = axes.pcolormesh(lines[0], lines[1], shown.T, shading="nearest", cmap="viridis_r")
    axes.set(xlabel=LABELS[names[0]], ylabel=LABELS[names[1]])
    if names[1] == "l2":
        axes.set_yscale("log")
    best = np.unravel_index(np.nanargmin(values), values.shape)
    axes.plot(lines[0][best[0]], lines[1][best[1]], "x", color="white", ms=10, mew=2.5)
    return image, lines


def fig1(folder):
    found = list(grids(folder))
    methods = [m for m in COLOURS if (folder / found[0][0] / f"trajectories-{m}-000.json").exists()]
    figure, axes = canvas(len(methods), len(found))
    for line, (setting, names, grid) in zip(axes, found, strict=True):
        for place, method in zip(line, methods, strict=True):
            image, lines = shade(place, names, grid, "test_loss", True)
            floor = lines[1][0] / 3 if names[1] == "l2" else -np.inf  # a clipped L2 of 0 is shown below
            for run in runs(folder, setting, f"trajectories-{method}"):
                x, y = (np.array([np.mean(row[name]) for row in run["path"]]) for name in names)
                y = np.maximum(y, floor)
                place.plot(x, y, color="white", lw=0.9)
                place.plot(x[0], y[0], "s", color="tab:red", ms=6)
                place.plot(x[-1], y[-1], "*", color="gold", mec="black", ms=13)
            place.set_title(f"{setting}\n{method}", fontsize=9)
        figure.colorbar(image, ax=line[-1], label="log10 of test loss, λ fixed")
    return figure


def fig2(folder):
    rows = table(folder, "fig2")
    names = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = canvas(len(names), 2)
    for k, name in enumerate(names):
        mine = [row for row in rows if row["run"] == name]
        steps = [row["step"] for row in mine]
        for line, kind, scale in ((axes[0], "error", 100), (axes[1], "loss", 1)):
            for part, style in (("train", ":"), ("val", "--"), ("test", "-")):
                values = [max(scale * row[f"{part}_{kind}"], 1e-4) for row in mine]
                label = {"train": "T1", "val": "T2", "test": "test"}[part]
                line[k].plot(steps, values, style, color=COLOURS[name], label=label)
            every = [scale * row[f"{part}_{kind}"] for row in rows for part in ("val", "test")]
            top = 1.1 * np.quantile(every, 0.97)
            line[k].set(
                xlabel="training step",
                ylabel="error, %" if kind == "error" else "cross-entropy",
                ylim=(0, top),
            )
            line[k].legend(fontsize=8)
        axes[0][k].set_title(name, fontsize=9)
    return figure


def fig3(folder):
    rows = table(folder, "fig3")
    names = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = canvas(len(names), 2)
    for k, name in enumerate(names):
        mine = [row for row in rows if row["run"] == name]
        steps = [row["step"] for row in mine]
        axes[0][k].plot(steps, [row["input_noise"] for row in mine], color="tab:green")
        axes[0][k].set(ylabel="input noise", xlabel="training step", ylim=(0, None))
        axes[0][k].set_title(name, fontsize=9)
        layers = sorted(c for c in mine[0] if c.startswith("l2"))
        for layer, column in enumerate(layers):
            values = np.maximum([row[column] for row in mine], 1e-7)
            faint = 1 - 0.8 * layer / max(len(layers) - 1, 1)
            axes[1][k].plot(steps, values, color="tab:red", alpha=faint, label=f"layer {layer + 1}")
        axes[1][k].set(yscale="log", ylabel="L2 (0 is shown at 1e-7)", xlabel="training step")
        axes[1][k].legend(fontsize=8)
    return figure


def scatter(folder, x, y, labels, log=False):
    """A panel for each setting, a colour for each method."""
    rows = table(folder, "sweep")
    names = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = canvas(len(names))
    for place, setting in zip(axes[0], names, strict=True):
        mine = [row for row in rows if row["setting"] == setting]
        for method in dict.fromkeys(row["method"] for row in mine):
            points = [(100 * row[x], 100 * row[y]) for row in mine if row["method"] == method]
            place.plot(
                *zip(*points, strict=True), "o", ms=4.5, alpha=0.7, color=COLOURS[method], label=method
            )
        every = [100 * row[name] for row in mine for name in (x, y)]
        ends = np.array([0.95 * min(every), 1.05 * max(every)])
        place.plot(ends, ends, color="gray", lw=0.8, ls="--")
        place.set(xlabel=labels[0], ylabel=labels[1], title=setting)
        if log:
            place.set(xscale="log", yscale="log")
            for axis in (place.xaxis, place.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("{x:g}")
        place.legend(fontsize=8)
    return figure


def fig4(folder):
    labels = "test error before, %, λ fixed at its start", "after, %, λ fixed where T1−T2 ended"
    return scatter(folder, "before_test_error", "after_test_error", labels)


def fig5(folder):
    return scatter(
        folder,
        "tuned_test_error",
        "after_test_error",
        ("test error of T1−T2, %", "of a rerun with λ fixed, %"),
    )


def fig6(folder):
    return scatter(folder, "tuned_val_error", "tuned_test_error", ("error on T2, %", "test error, %"))


def fig7(folder):
    found = list(grids(folder))
    figure, axes = canvas(2, len(found))
    for line, (setting, names, grid) in zip(axes, found, strict=True):
        for place, kind, label in (
            (line[0], "test_loss", "log10 of test loss"),
            (line[1], "test_error", "test error, %"),
        ):
            image, _ = shade(place, names, grid, kind, kind == "test_loss")
            figure.colorbar(image, ax=place, label=label)
            place.set_title(setting, fontsize=9)
    return figure


NEEDS = {
    "fig1": "fig1",
    "fig2": "fig2",
    "fig3": "fig3",
    "fig4": "sweep",
    "fig5": "sweep",
    "fig6": "sweep",
    "fig7": "fig7",
}
"""The table in whose presence a figure can be drawn."""


def draw(name, folder):
    path = folder / f"{name}.png"
    globals()[name](folder).savefig(path, dpi=75)
    print(f"drew {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("paper-runs"))
    options = parser.parse_args()
    for name, needed in NEEDS.items():
        for path in sorted(options.out.glob(f"**/{needed}.csv")):
            draw(name, path.parent)


if __name__ == "__main__":
    main()
