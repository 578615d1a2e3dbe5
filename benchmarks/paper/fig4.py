"""Figure 4: how good is training with λ fixed, before and after T1−T2 has tuned it?

    python -m benchmarks.paper.fig4 [--preset smoke|small|paper] [--data FOLDER] [--dataset NAME] [--draw]

From each random start the network is trained with λ fixed there, by T1−T2, and again with λ fixed where T1−T2
ended. The claim is that no tuned point is poor, however poor its start. Figures 5 and 6 read the same logs.
"""

import numpy as np

from benchmarks.paper.claims import column, grouped
from benchmarks.paper.report import report
from benchmarks.paper.sweep import sweep


def study(lab):
    numbers = {}
    for name, rows in grouped(sweep(lab), "setting", "method").items():
        before, after = (100 * column(rows, f"{when}_test_error") for when in ("before", "after"))
        losses = [column(rows, f"{when}_test_loss") for when in ("before", "after")]
        lower = np.mean(losses[1] < losses[0])
        numbers[name] = (
            f"improved {np.mean(after < before):.2f} of {len(rows)} starts; test error before "
            f"{before.mean():.2f} % on average, {before.max():.2f} % at worst, after {after.mean():.2f} % "
            f"and {after.max():.2f} %; best before {before.min():.2f} %; test loss "
            f"{losses[0].mean():.3f} and {losses[1].mean():.3f}, lower in {lower:.2f}"
        )
    return numbers


def main() -> None:
    report("fig4", __doc__, study)


if __name__ == "__main__":
    main()
