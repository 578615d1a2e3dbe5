"""One L2 penalty, one for each group of features, or one for each feature: which predicts best?

    python -m benchmarks.estimators.penalty_groups [--preset smoke|small|full] [--out FOLDER]

A log-linear model (multinomial logistic regression) is trained to its optimum on every training part of a
5-fold cross-validation at once, and the logarithms of its penalties move down the hypergradient of the
summed validation losses, by ``hg.Implicit(hg.CG(…))`` and L-BFGS-B: the setting of Foo, Do and Ng 2008.
Compared are a single penalty from a grid, a single penalty by hypergradient, and penalties for groups of
features and for each feature: as they are, and with a normal prior on the logarithms, whose mean is that of
the single penalty. With the penalties found the model is trained once more, on all folds, and judged on
examples that nothing has seen.

The groups are in the nature of the data: breast cancer has 10 measurements of cells, each with its mean,
error and worst value; digits have 8 × 8 pixels in 4 rings. In two more sets the features are of different
kinds, as they were in Foo's: the measurements of breast cancer, their squares and their products; and digits
at three resolutions. These two sets, the number of training examples and the prior were chosen by test loss
on a few splits of the same data, of seeds from 1000 on; the splits reported are those of seeds from 0 on.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import autograd.numpy as np
from autograd import grad, make_vjp
from scipy import optimize, stats

import hypergrad as hg
from benchmarks.shared import report
from benchmarks.shared.networks import cross_entropies
from hypergrad.tuning.progress import progress

SETS = ("breast cancer", "breast cancer, products", "digits", "digits, scales")
FOLDS = 5
BOUNDS = (-8.0, 12.0)
"""Of the logarithms. The loss is a sum over examples: a penalty is the inverse of scikit-learn's C."""
BIAS = 1e-3
"""The fixed penalty of the biases, which makes the optimum unique."""
WIDTH = 1.0
"""Standard deviation of the prior on the logarithms."""
PRESETS = {
    "smoke": {"splits": 2, "evaluations": 3, "examples": 60, "grid": 3},
    "small": {"splits": 10, "evaluations": 40, "examples": 200, "grid": 29},
    "full": {"splits": 40, "evaluations": 100, "examples": 200, "grid": 29},
}


def load(name, examples, seed):
    """Inputs and one-hot labels in random order, scaled by the first ``examples``, and groups of features."""
    from sklearn import datasets

    table = name.startswith("breast")
    x, y = (datasets.load_breast_cancer if table else datasets.load_digits)(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))

    def scaled(x):  # one scale for all pixels, one for each feature of a table
        seen = x[:examples]
        return (x - seen.mean(0)) / (seen.std(0) if table else seen.std())

    x, y = scaled(x[order]), np.eye(y.max() + 1)[y[order]]
    if name == "breast cancer":
        return x, y, {"10 measurements": np.arange(30) % 10, "30 features": np.arange(30)}
    if name == "digits":
        edge = np.minimum(np.arange(8), np.arange(8)[::-1])
        rings = np.minimum(edge[:, None], edge).ravel()
        return x, y, {"4 rings": rings, "64 pixels": np.arange(64)}
    if table:
        i, j = np.triu_indices(30, 1)
        parts = [x, x**2, x[:, i] * x[:, j]]
    else:
        blocks = (x.reshape(-1, 8 // k, k, 8 // k, k).mean((2, 4)) for k in (1, 2, 4))
        parts = [block.reshape(len(x), -1) for block in blocks]
    kinds = np.repeat(np.arange(3), [part.shape[1] for part in parts])
    return scaled(np.concatenate(parts, 1)), y, {"3 kinds" if table else "3 scales": kinds}


@dataclass
class Folds:
    """Copies of the model, each trained on its own part of the same examples and validated on the rest.

    θ has shape (copies, features + 1, classes); ``trained``, of zeros and ones, says which copy sees what.
    ``spent`` counts gradients of all copies together, a second-order product for two.
    """

    x: np.ndarray
    y: np.ndarray
    trained: np.ndarray
    groups: np.ndarray
    spent: float = 0.0
    theta: np.ndarray = field(init=False)

    def __post_init__(self):
        self.x = np.concatenate([self.x, np.ones((len(self.x), 1))], 1)
        self.theta = np.zeros((len(self.trained), self.x.shape[1], self.y.shape[1]))
        self.problem = hg.Bilevel(self.inner, self.outer)

    def losses(self, theta):
        """Cross-entropy of each copy on each example."""
        return cross_entropies(np, self.x @ theta, self.y)

    def strengths(self, log_l2):
        return np.concatenate([np.exp(log_l2[self.groups]), np.array([BIAS])])[:, None]

    def inner(self, theta, log_l2, batch):
        penalty = np.sum(self.strengths(log_l2) * theta**2) / 2
        return (np.sum(self.trained * self.losses(theta)) + penalty) / len(self.x)

    def outer(self, theta, log_l2, batch):
        return np.sum((1 - self.trained) * self.losses(theta)) / len(self.x)

    def cg(self, theta, log_l2, rtol):
        """Conjugate gradients, preconditioned by the diagonal of the Hessian, which is known here."""
        logits = self.x @ theta
        p = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
        p = p / np.sum(p, axis=-1, keepdims=True)
        curvature = self.trained[..., None] * p * (1 - p)
        diagonal = (self.x.T**2 @ curvature + self.strengths(log_l2)) / len(self.x)
        return hg.CG(2000, rtol, preconditioner=lambda v: v / diagonal)

    def train(self, log_l2, tolerance=1e-9):
        """Newton's method from the last optimum to the one for these penalties."""
        theta = self.theta
        for _ in range(100):
            product, g = make_vjp(grad(self.inner))(theta, log_l2, None)
            self.spent += 1
            if (size := np.linalg.norm(g)) < tolerance:
                break
            # Far away a step is not worth many products.
            step = hg.solve(product, -g, self.cg(theta, log_l2, np.clip(size, 1e-3, 0.3)))
            self.spent += 2 * (int(step.products) + 1)
            value, slope, rate = self.inner(theta, log_l2, None), np.sum(g * step.x), 1.0
            while self.inner(theta + rate * step.x, log_l2, None) > value + 1e-4 * rate * slope + 1e-14:
                rate /= 2
            theta = theta + rate * step.x
        self.theta = theta
        return theta

    def value(self, log_l2):
        """The validation loss of models trained with these penalties."""
        return float(self.outer(self.train(log_l2), log_l2, None))

    def value_and_slope(self, log_l2, mean=0.0, width=np.inf):
        """The same and its hypergradient, each with that of a normal prior on the logarithms."""
        theta = self.train(log_l2)
        estimator = hg.Implicit(self.cg(theta, log_l2, 1e-6), checks=hg.Checks(tolerance=1e-6))
        state = estimator.init(self.problem, theta, log_l2)
        out = estimator.estimate(self.problem, state, log_l2, None, None)
        self.spent += out.report.cost
        away, weight = log_l2 - mean, 1 / (width**2 * len(self.x))
        return out.outer_value + weight * np.sum(away**2) / 2, out.hypergradient + weight * away


def compare(name, options, seed, check):
    """Tune by each method on one split of a data set, and judge what comes of it."""
    n = options["examples"]
    x, y, groupings = load(name, n, seed)
    left_out = np.arange(n) % FOLDS == np.arange(FOLDS)[:, None]
    one, rows = np.zeros(x.shape[1], int), {}

    def row(method, folds, log_l2, evaluations):
        final = Folds(x[:n], y[:n], np.ones((1, n)), folds.groups)
        theta = final.train(log_l2)
        test = Folds(x[n:], y[n:], np.ones((1, len(x) - n)), folds.groups)
        wrong = (test.x @ theta[0]).argmax(-1) != test.y.argmax(-1)
        rows[method] = {
            "cv_loss": folds.value(log_l2),
            "test_loss": float(test.losses(theta).mean()),
            "test_error": float(wrong.mean()),
            "gradients": float(folds.spent),
            "evaluations": int(evaluations),
            "log_l2": log_l2.tolist(),
        }

    def descend(folds, start, *prior):
        size, limit = len(start), {"maxfun": options["evaluations"]}
        found = optimize.minimize(
            folds.value_and_slope, start, prior, "L-BFGS-B", True, bounds=[BOUNDS] * size, options=limit
        )
        return found.x, found.nfev

    grid, folds = np.linspace(8, -6, options["grid"]), Folds(x[:n], y[:n], 1.0 - left_out, one)
    values = [folds.value(np.array([log_l2])) for log_l2 in grid]
    row("one, grid", folds, grid[[np.argmin(values)]], len(grid))
    folds = Folds(x[:n], y[:n], 1.0 - left_out, one)
    single, count = descend(folds, np.zeros(1))
    row("one", folds, single, count)
    for grouping, groups in groupings.items():
        for prior in ((), (single[0], WIDTH)):
            # Begun where the single penalty ended, whose cost is counted.
            folds = Folds(x[:n], y[:n], 1.0 - left_out, groups, rows["one"]["gradients"])
            log_l2, evaluations = descend(folds, np.full(groups.max() + 1, single[0]), *prior)
            row(grouping + (", prior" if prior else ""), folds, log_l2, count + evaluations)
    if check:
        folds, step = Folds(x[:n], y[:n], 1.0 - left_out, groups), 1e-3
        p = np.random.default_rng(seed).normal(size=groups.max() + 1)
        ahead, behind = (folds.value(sign * step * p) for sign in (1, -1))
        slope = folds.value_and_slope(0 * p)[1] @ p
        error = abs(slope / ((ahead - behind) / (2 * step)) - 1)
        print(f"{name}: a hypergradient against central differences of training: relative error {error:.1e}")
    return rows


def summary(rows, ratio):
    """Means over splits, and differences of test loss from the single penalty by hypergradient.

    Their 95 % intervals are those over splits of these data, and those for new data, which are wider since
    splits overlap (Nadeau and Bengio 2003); ``ratio`` is that of test to training examples.
    """
    count, result = len(rows), {}
    t = stats.t.ppf(0.975, count - 1)
    losses = {method: np.array([row[method]["test_loss"] for row in rows]) for method in rows[0]}
    for method, loss in losses.items():
        difference = loss - losses["one"]
        keys = ("cv_loss", "test_loss", "test_error", "gradients", "evaluations")
        result[method] = {key: float(np.mean([row[method][key] for row in rows])) for key in keys} | {
            "penalties": len(rows[0][method]["log_l2"]),
            "standard_error": float(loss.std(ddof=1) / count**0.5),
            "difference": float(difference.mean()),
            "interval": float(t * difference.std(ddof=1) / count**0.5),
            "interval_new_data": float(t * difference.std(ddof=1) * (1 / count + ratio) ** 0.5),
            "better": int((difference < 0).sum()),
        }
    return result


def show(name, table, count):
    title = f"{name}: means over {count} splits; differences from one penalty, ± 95 %"
    headings = "penalties,number,CV loss,test loss ± s.e.,difference,for new data,better,test error,gradients"
    rows = [
        (
            method,
            str(row["penalties"]),
            f"{row['cv_loss']:.4f}",
            f"{row['test_loss']:.4f} ± {row['standard_error']:.4f}",
            f"{row['difference']:+.4f} ± {row['interval']:.4f}",
            f"± {row['interval_new_data']:.4f}",
            f"{row['better']}/{count}",
            f"{100 * row['test_error']:.1f} %",
            f"{row['gradients']:.0f}",
        )
        for method, row in table.items()
    ]
    report.show(title, headings.split(","), rows, 140)


def plot(path, tables):
    """Above, test loss against the price of it; below, differences on the same splits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(tables), 7), layout="constrained")
    panels = figure.subplots(2, len(tables), squeeze=False)
    for (name, table), price, paired in zip(tables.items(), *panels, strict=True):
        for i, (method, row) in enumerate(table.items()):
            price.errorbar(
                row["gradients"], row["test_loss"], row["standard_error"], fmt="o", capsize=3, label=method
            )
            for size, width in ((row["interval_new_data"], 1), (row["interval"], 3)):
                paired.errorbar(row["difference"], i, xerr=size, fmt="o", color=f"C{i}", elinewidth=width)
        price.set(title=name, xlabel="gradients spent", ylabel="test log-loss ± s.e.", xscale="log")
        price.tick_params(axis="x", which="minor", labelbottom=False)
        price.legend(fontsize=7)
        paired.axvline(0, color="gray", lw=1)
        if any(row["interval_new_data"] > 0.1 for row in table.values()):
            paired.set_xscale("symlog", linthresh=0.1)
        paired.set(yticks=range(len(table)), yticklabels=table, xlabel="difference in test log-loss")
        paired.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="sets of data and features")
    parser.add_argument("--splits", type=int, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of the first split")
    parser.add_argument("--out", type=Path, help="a folder for penalty_groups.json and .png")
    arguments = parser.parse_args()

    options = PRESETS[arguments.preset] | ({"splits": arguments.splits} if arguments.splits else {})
    tables, results = {}, {}
    for name in arguments.sets:
        rows = []
        with progress(name, options["splits"]) as advance:
            for seed in range(arguments.seed, arguments.seed + options["splits"]):
                rows.append(compare(name, options, seed, check=not rows))
                advance(1, "")
        size = len(load(name, options["examples"], 0)[0])
        tables[name], results[name] = summary(rows, size / options["examples"] - 1), rows
        show(name, tables[name], len(rows))
    if arguments.out:
        about = options | {"seed": arguments.seed, "tables": tables, "splits": results}
        report.save(arguments.out / "penalty_groups.json", about)
        plot(arguments.out / "penalty_groups.png", tables)


if __name__ == "__main__":
    main()
