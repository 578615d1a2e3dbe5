"""Figure 1: do all starts of λ end in the low region of a grid search?

    python -m benchmarks.paper.fig1 [--preset smoke|small|paper] [--data FOLDER] [--draw]

Two pairs of hyperparameters: input noise and L2, without batch normalisation; input and hidden noise, with
it. The grid trains with λ fixed at each of its points; trajectories start near its corners and the middles of
its sides, with the same split and first weights. Each end is then trained again with λ fixed
there, which is what the grid did, and compared with the grid's best test log-likelihood.
"""

import numpy as np

from benchmarks.paper.grid import axes, grid
from benchmarks.paper.report import report

CORNERS = [(0, 0), (1, 1), (0, 1), (1, 0), (0.5, 1), (0.5, 0), (0, 0.5), (1, 0.5)]
"""Where trajectories start, as shares of the grid's sides, of which a margin is left out."""
MARGIN = 0.05


def starts(lab, setting):
    found = []
    for place in CORNERS[: lab.preset.trajectories]:
        values = {}
        for share, (name, line) in zip(place, axes(lab, setting).items(), strict=True):
            share = MARGIN + (1 - 2 * MARGIN) * share
            low, high = np.log(line[[0, -1]]) if name == "l2" else line[[0, -1]]
            value = low + share * (high - low)
            values[name] = float(np.exp(value) if name == "l2" else value)
        found.append(setting.filled(values, lab.images.shape))
    return found


def study(lab):
    numbers, rows = {}, []
    for setting in lab.settings[:2]:
        losses_of_grid = np.sort([run["test_loss"] for run in grid(lab, setting)])
        begin, best, median = starts(lab, setting), losses_of_grid[0], np.median(losses_of_grid)
        seeds = [lab.seed] * len(begin)
        first = lab.jobs(setting, "corners", None, seeds, begin)
        for method in lab.preset.methods:
            tuned = lab.jobs(setting, f"trajectories-{method.name}", method, seeds, begin)
            after = lab.again(setting, f"trajectories-after-{method.name}", seeds, tuned)
            mine = []
            for s, t, a in zip(first, tuned, after, strict=True):
                losses = {"start": s["test_loss"], "tuned": t["test_loss"], "end": a["test_loss"]}
                shares = {
                    f"grid_better_than_{k}": float(np.mean(losses_of_grid < losses[k]))
                    for k in ("start", "end")
                }
                about = {"setting": setting.name, "method": method.name, "grid_best": best}
                mine.append(about | losses | shares)
            rows += mine
            ends = np.array([row["end"] for row in mine])
            numbers[f"{setting.name}, {method.name}"] = (
                f"test loss with λ fixed at the end: at most {ends.max():.3f}, mean {ends.mean():.3f}; "
                f"at the start: mean {np.mean([row['start'] for row in mine]):.3f}; the grid: best "
                f"{best:.3f}, median {median:.3f}; ends better than the grid's median: "
                f"{(ends < median).sum()} of {len(mine)}"
            )
    lab.logs.table("fig1", rows)
    return numbers


def main() -> None:
    report("fig1", __doc__, study)


if __name__ == "__main__":
    main()
