"""Figure 7: is the best λ for the log-likelihood also the best for the error?

    python -m benchmarks.paper.fig7 [--preset smoke|small|paper] [--data FOLDER] [--draw]

The grids of figure 1, and their logs: no tuning at all.
"""

import numpy as np

from benchmarks.paper.grid import grid
from benchmarks.paper.report import report


def study(lab):
    numbers, rows = {}, []
    for setting in lab.settings[:2]:
        runs = grid(lab, setting)
        rows += [
            {"setting": setting.name}
            | {name: float(np.mean(run["start"][name])) for name in setting.hparams}
            | {name: run[name] for name in ("test_loss", "test_error")}
            for run in runs
        ]
        n, places = lab.preset.grid, {}
        for kind in ("test_loss", "test_error"):
            k = int(np.argmin([run[kind] for run in runs]))
            places[kind] = np.array(divmod(k, n)), runs[k]
        (a, by_loss), (b, by_error) = places["test_loss"], places["test_error"]

        def at(run, setting=setting):
            return ", ".join(f"{name} {np.mean(run['start'][name]):.2g}" for name in setting.hparams)

        numbers[setting.name] = (
            f"best log-likelihood at {at(by_loss)}; best error at {at(by_error)}: {np.abs(a - b).max()} "
            f"cells apart of a {n} × {n} grid; test error {100 * by_loss['test_error']:.2f} % and "
            f"{100 * by_error['test_error']:.2f} %, test loss {by_loss['test_loss']:.4f} and "
            f"{by_error['test_loss']:.4f}"
        )
    lab.logs.table("fig7", rows)
    return numbers


def main() -> None:
    report("fig7", __doc__, study)


if __name__ == "__main__":
    main()
