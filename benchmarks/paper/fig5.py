"""Figure 5: is a run by T1−T2 as good as one with λ fixed where it ended? That is hysteresis.

    python -m benchmarks.paper.fig5 [--preset smoke|small|paper] [--data FOLDER] [--dataset NAME] [--draw]

The runs are those of figure 4. The claim is a strong correlation, and that reruns are somewhat better. A run
and its rerun share their split and first weights, which correlate them too. The run with λ fixed at the start
shares these and no tuning: its correlation with T1−T2 is printed beside.
"""

import numpy as np

from benchmarks.paper.claims import bootstrap, column, rank_correlation, shown
from benchmarks.paper.report import report
from benchmarks.paper.sweep import groups, sweep


def study(lab):
    numbers = {}
    for name, rows in groups(sweep(lab)).items():
        tuned, after = (column(rows, f"{when}_test_error") for when in ("tuned", "after"))
        shared = rank_correlation(tuned, column(rows, "before_test_error"))
        own = shown(bootstrap(rank_correlation, tuned, after))
        gain = bootstrap(np.mean, tuned - after)
        numbers[name] = (
            f"rank correlation {own}, {shared:.2f} with λ fixed at the start; "
            f"reruns have a test error lower by {shown(gain, 100)} points, "
            f"and are better in {np.mean(after < tuned):.2f} of {len(rows)}"
        )
    return numbers


def main() -> None:
    report("fig5", __doc__, study)


if __name__ == "__main__":
    main()
