"""Figure 3: does noise rise and then fall, and does L2 end stronger in higher layers?

    python -m benchmarks.paper.fig3 [--preset smoke|small|paper] [--data FOLDER] [--dataset svhn] [--draw]

The hyperparameters of figure 2's tuned runs, and their logs.

In a rectifier network little separates the layers: with h_l = max(0, z_l) and z_l = W_l h_{l-1} + b_l,

    ⟨W_{l+1}, ∂C/∂W_{l+1}⟩ = ⟨h_l, ∂C/∂h_l⟩ = ⟨z_l, ∂C/∂z_l⟩ = ⟨W_l, ∂C/∂W_l⟩ + ⟨b_l, ∂C/∂b_l⟩,

and ``code`` moves λ_l along 2 ⟨W_l, ∂C2/∂W_l⟩: its hypergradients differ between layers by the biases' terms
alone. Those of ``exact`` are preconditioned by Adam, and differ.
"""

import numpy as np

from benchmarks.paper.claims import rank_correlation
from benchmarks.paper.logs import spread
from benchmarks.paper.over_training import middle, over_training
from benchmarks.paper.report import report


def study(lab):
    numbers, rows = {}, []
    for name, run in over_training(lab).items():
        if not run["path"]:
            continue
        noise, l2 = ([row[k] for row in run["path"]] for k in ("input_noise", "l2"))
        peak = int(np.argmax(noise))
        when, depth = peak / (len(noise) - 1), np.arange(len(l2[-1]))
        layers = ", ".join(f"{x:.3g}" for x in l2[-1])
        numbers[name] = (
            f"noise {noise[0]:.2f} at the start, {noise[peak]:.2f} at its peak, after {when:.0%} "
            f"of the run, {noise[-1]:.2f} at the end; L2 from the input to the top {layers}, "
            f"rank correlation with depth {rank_correlation(depth, np.array(l2[-1])):.2f}"
        )
        rows += [{"run": name} | spread(row) for row in run["path"]]
    lab.logs.table("fig3", rows)
    return numbers


def main() -> None:
    report("fig3", __doc__, study, middle)


if __name__ == "__main__":
    main()
