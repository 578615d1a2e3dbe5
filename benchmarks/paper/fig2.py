"""Figure 2: does T1−T2 prevent the overfitting that λ fixed at the same start has?

    python -m benchmarks.paper.fig2 [--preset smoke|small|paper] [--data FOLDER] [--dataset svhn] [--draw]

The paper's data set is SVHN, with input noise and an L2 strength for each layer; where there is none,
Fashion-MNIST stands in. Overfitting is the test loss at the end over the smallest of the run.
"""

from benchmarks.paper.over_training import middle, over_training
from benchmarks.paper.report import report


def study(lab):
    numbers, rows = {}, []
    for name, run in over_training(lab).items():
        losses = [point["test_loss"] for point in run["curve"]]
        last = losses[-1]
        numbers[name] = (
            f"test loss {last:.3f} at the end, {last / min(losses):.2f} times the smallest of the "
            f"run; T1 loss without noise {run['train_loss']:.4f}; test error {100 * run['test_error']:.2f} %"
        )
        rows += [{"run": name} | point for point in run["curve"]]
    lab.logs.table("fig2", rows)
    return numbers


def main() -> None:
    report("fig2", __doc__, study, middle)


if __name__ == "__main__":
    main()
