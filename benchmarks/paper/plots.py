"""The figures, drawn from the logs alone.

    python -m benchmarks.paper.plots [--out FOLDER]

draws every figure whose logs lie under the folder, beside them. ``--draw`` of a figure's script does so
for that one.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.paper.claims import grouped
from benchmarks.paper.logs import grids, runs, table, title

COLOURS = {
    "code-clipped": "tab:blue",
    "code-clipped-own": "tab:purple",
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


def canvas(columns, rows=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE * columns, SIZE * 0.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def heat_map(axes, names, grid, kind):
    """Losses of a grid as log10, errors in percent, the best of them marked; and the grid's lines."""
    lines = [np.unique([np.mean(run["start"][name]) for run in grid]) for name in names]
    values = np.full([len(line) for line in lines], np.nan)
    for run in grid:
        at = [
            int(np.argmin(np.abs(line - np.mean(run["start"][n]))))
            for n, line in zip(names, lines, strict=True)
        ]
        values[tuple(at)] = run[kind]
    shown = np.log10(values) if kind == "test_loss" else 100 * values
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
            image, lines = heat_map(place, names, grid, "test_loss")
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


def fig7(folder):
    found = list(grids(folder))
    figure, axes = canvas(2, len(found))
    labels = {"test_loss": "log10 of test loss", "test_error": "test error, %"}
    for line, (setting, names, grid) in zip(axes, found, strict=True):
        for place, (kind, label) in zip(line, labels.items(), strict=True):
            image, _ = heat_map(place, names, grid, kind)
            figure.colorbar(image, ax=place, label=label)
            place.set_title(setting, fontsize=9)
    return figure


def over_training(rows):
    """A column of two panels for each run: the figure, and the runs' names, rows and panels."""
    found = grouped(rows, "run")
    figure, axes = canvas(len(found), 2)
    for top, name in zip(axes[0], found, strict=True):
        top.set_title(name, fontsize=9)
    for panel in axes.flat:
        panel.set_xlabel("training step")
    return figure, zip(found, found.values(), axes.T, strict=True)


def fig2(folder):
    rows = table(folder, "fig2")
    figure, columns = over_training(rows)
    for name, mine, panels in columns:
        steps = [row["step"] for row in mine]
        kinds = (("error", 100, "error, %"), ("loss", 1, "cross-entropy"))
        for panel, (kind, scale, label) in zip(panels, kinds, strict=True):
            for part, style, of in (("train", ":", "T1"), ("val", "--", "T2"), ("test", "-", "test")):
                values = [max(scale * row[f"{part}_{kind}"], 1e-4) for row in mine]
                panel.plot(steps, values, style, color=COLOURS[name], label=of)
            every = [scale * row[f"{part}_{kind}"] for row in rows for part in ("val", "test")]
            panel.set(ylabel=label, ylim=(0, 1.1 * np.quantile(every, 0.97)))
            panel.legend(fontsize=8)
    return figure


def fig3(folder):
    figure, columns = over_training(table(folder, "fig3"))
    for _, mine, (above, below) in columns:
        steps = [row["step"] for row in mine]
        above.plot(steps, [row["input_noise"] for row in mine], color="tab:green")
        above.set(ylabel="input noise", ylim=(0, None))
        layers = sorted(c for c in mine[0] if c.startswith("l2"))
        for layer, column in enumerate(layers):
            values = np.maximum([row[column] for row in mine], 1e-7)
            faint = 1 - 0.8 * layer / max(len(layers) - 1, 1)
            below.plot(steps, values, color="tab:red", alpha=faint, label=f"layer {layer + 1}")
        below.set(yscale="log", ylabel="L2 (0 is shown at 1e-7)")
        below.legend(fontsize=8)
    return figure


def scatter(folder, x, y, labels):
    """Test errors by the columns of the sweep: a panel for each setting, a colour for each method."""
    settings = grouped(table(folder, "sweep"), "setting")
    figure, axes = canvas(len(settings))
    for place, (setting, rows) in zip(axes[0], settings.items(), strict=True):
        for method, mine in grouped(rows, "method").items():
            points = [(100 * row[x], 100 * row[y]) for row in mine]
            place.plot(
                *zip(*points, strict=True), "o", ms=4.5, alpha=0.7, color=COLOURS[method], label=method
            )
        every = [100 * row[name] for row in rows for name in (x, y)]
        ends = np.array([0.95 * min(every), 1.05 * max(every)])
        place.plot(ends, ends, color="gray", lw=0.8, ls="--")
        place.set(xlabel=labels[0], ylabel=labels[1], title=setting)
        place.legend(fontsize=8)
    return figure


def fig4(folder):
    labels = "test error before, %, λ fixed at its start", "after, %, λ fixed where T1−T2 ended"
    return scatter(folder, "before_test_error", "after_test_error", labels)


def fig5(folder):
    labels = "test error of T1−T2, %", "of a rerun with λ fixed, %"
    return scatter(folder, "tuned_test_error", "after_test_error", labels)


def fig6(folder):
    return scatter(folder, "tuned_val_error", "tuned_test_error", ("error on T2, %", "test error, %"))


FIGURES = {"fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "fig6": fig6, "fig7": fig7}


def draw(name, folder):
    path = folder / f"{name}.png"
    figure = FIGURES[name](folder)
    figure.suptitle(title(folder, name), fontsize=9)
    figure.savefig(path, dpi=75)
    print(f"drew {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("paper-runs"))
    options = parser.parse_args()
    for name in FIGURES:
        for path in sorted(options.out.glob(f"**/{name}.json")):
            draw(name, path.parent)


if __name__ == "__main__":
    main()
