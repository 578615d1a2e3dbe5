"""Figure 4: how good is training with λ fixed, before and after T1−T2 has tuned it?

    python benchmarks/paper/fig4.py [--preset smoke|small|paper] [--data FOLDER] [--dataset NAME] [--draw]

From each random start the network is trained with λ fixed there, by T1−T2, and again with λ fixed where T1−T2
ended. The claim is that no tuned point is poor, however poor its start. Figures 5 and 6 read the same logs.
"""

import numpy as np
from claims import column, grouped
from experiment import Lab, arguments
from plots import draw


def main() -> None:
    options = arguments(__doc__)
    lab, numbers = Lab(options), {}
    for name, rows in grouped(lab.sweep(), "setting", "method").items():
        before, after = (column(rows, f"{when}_test_error") for when in ("before", "after"))
        better = np.mean(after < before)
        losses = [column(rows, f"{when}_test_loss") for when in ("before", "after")]
        lower = np.mean(losses[1] < losses[0])
        numbers[name] = (
            f"improved {better:.2f} of {len(rows)} starts; test error before {100 * before.mean():.2f} % on "
            f"average, {100 * before.max():.2f} % at worst, after {100 * after.mean():.2f} % and "
            f"{100 * after.max():.2f} %; best before {100 * before.min():.2f} %; test loss "
            f"{losses[0].mean():.3f} and {losses[1].mean():.3f}, lower in {lower:.2f}"
        )
    lab.claim("fig4", numbers)
    if options.draw:
        draw("fig4", lab.out)


if __name__ == "__main__":
    main()
