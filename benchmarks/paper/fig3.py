"""Figure 3: does noise rise and then fall, and does L2 end stronger in higher layers?

    python benchmarks/paper/fig3.py [--preset smoke|small|paper] [--data FOLDER] [--dataset svhn] [--draw]

The hyperparameters of figure 2's tuned runs, and their logs.
"""

import numpy as np
from claims import rank_correlation
from experiment import Lab, arguments, deep_runs, middle, spread
from plots import draw


def main() -> None:
    options = middle(arguments(__doc__))
    lab = Lab(options)
    numbers, rows = {}, []
    for name, run in deep_runs(lab).items():
        if not run["path"]:
            continue
        noise, l2 = ([row[k] for row in run["path"]] for k in ("input_noise", "l2"))
        peak = int(np.argmax(noise))
        when, depth = peak / (len(noise) - 1), np.arange(len(l2[-1]))
        layers = ", ".join(f"{x:.1e}" for x in l2[-1])
        numbers[name] = (
            f"noise {noise[0]:.2f} at the start, {noise[peak]:.2f} at its peak, after {when:.0%} "
            f"of the run, {noise[-1]:.2f} at the end; L2 from the input to the top {layers}, "
            f"rank correlation with depth {rank_correlation(depth, np.array(l2[-1])):.2f}"
        )
        rows += [{"run": name} | spread(row) for row in run["path"]]
    lab.table("fig3", rows)
    lab.claim("fig3", numbers)
    if options.draw:
        draw("fig3", lab.out)


if __name__ == "__main__":
    main()
