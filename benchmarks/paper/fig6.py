"""Figure 6: is the error on T2, by which λ was tuned, still indicative of the test error?

    python -m benchmarks.paper.fig6 [--preset smoke|small|paper] [--data FOLDER] [--dataset NAME] [--draw]

The runs are those of figure 4, at their end. The claim is no overfitting to T2: a strong correlation where
errors vary, and on MNIST all of them low. T2 is another for each start, so part of the scatter is its own;
the runs with λ fixed, which never saw T2, show how much of the difference between T2 and test is that.
"""

import numpy as np

from benchmarks.paper.claims import bootstrap, column, rank_correlation, shown
from benchmarks.paper.report import report
from benchmarks.paper.sweep import groups, sweep


def study(lab):
    numbers = {}
    for name, rows in groups(sweep(lab)).items():
        val, test = (column(rows, f"tuned_{on}_error") for on in ("val", "test"))
        fixed = column(rows, "after_test_error") - column(rows, "after_val_error")
        numbers[name] = (
            f"rank correlation {shown(bootstrap(rank_correlation, val, test))}; test minus T2 error "
            f"{shown(bootstrap(np.mean, test - val), 100)} points, of reruns with λ fixed "
            f"{shown(bootstrap(np.mean, fixed), 100)}, paired difference "
            f"{shown(bootstrap(np.mean, test - val - fixed), 100)}"
        )
    return numbers


def main() -> None:
    report("fig6", __doc__, study)


if __name__ == "__main__":
    main()
