"""Figure 1: do all starts of λ end in the low region of a grid search?

    python benchmarks/paper/fig1.py [--preset smoke|small|paper] [--data FOLDER] [--draw]

Two pairs of hyperparameters: input noise and L2, without batch normalisation; input and hidden noise, with
it. The grid trains with λ fixed at each of its points; trajectories start near its corners and the middles of
its sides, with the same split and first weights. Each end is then trained again with λ fixed
there, which is what the grid did, and compared with the grid's best test log-likelihood.
"""

import numpy as np
from experiment import METHODS, Lab, arguments, numeric
from plots import draw

CORNERS = [(0, 0), (1, 1), (0, 1), (1, 0), (0.5, 1), (0.5, 0), (0, 0.5), (1, 0.5)]
"""Where trajectories start, as shares of the grid's sides, of which a margin is left out."""
MARGIN = 0.05


def starts(lab, setting):
    found = []
    for place in CORNERS[: lab.preset.trajectories]:
        values = {}
        for share, (name, line) in zip(place, lab.axes(setting).items(), strict=True):
            share = MARGIN + (1 - 2 * MARGIN) * share
            low, high = np.log(line[[0, -1]]) if name == "l2" else line[[0, -1]]
            value = low + share * (high - low)
            values[name] = float(np.exp(value) if name == "l2" else value)
        found.append(setting.filled(values, lab.images.shape))
    return found


def main() -> None:
    options = arguments(__doc__)
    lab, numbers, rows = Lab(options), {}, []
    for setting in lab.settings[:2]:
        grid = np.sort([run["test_loss"] for run in lab.grid(setting)])
        begin, best = starts(lab, setting), grid[0]
        seeds = [lab.seed] * len(begin)
        first = lab.jobs(setting, "corners", None, seeds, begin)
        for method in METHODS:
            tuned = lab.jobs(setting, f"trajectories-{method.name}", method, seeds, begin)
            ends = [numeric(run["end"]) for run in tuned]
            after = lab.jobs(setting, f"trajectories-after-{method.name}", None, seeds, ends)
            for s, t, a in zip(first, tuned, after, strict=True):
                losses = {"start": s["test_loss"], "tuned": t["test_loss"], "end": a["test_loss"]}
                shares = {f"grid_better_than_{k}": float(np.mean(grid < losses[k])) for k in ("start", "end")}
                rows.append(
                    {"setting": setting.name, "method": method.name, "grid_best": best, **losses, **shares}
                )
            mine = rows[-len(begin) :]
            worst = max(row["end"] for row in mine)
            numbers[f"{setting.name}, {method.name}"] = (
                f"test loss with λ fixed at the end: at most {worst:.3f}, mean "
                f"{np.mean([row['end'] for row in mine]):.3f}; at the start: mean "
                f"{np.mean([row['start'] for row in mine]):.3f}; the grid: best {best:.3f}, median "
                f"{np.median(grid):.3f}; ends better than the grid's median: "
                f"{sum(row['end'] < np.median(grid) for row in mine)} of {len(mine)}"
            )
    lab.table("fig1", rows)
    lab.claim("fig1", numbers)
    if options.draw:
        draw("fig1", lab.out)


if __name__ == "__main__":
    main()
