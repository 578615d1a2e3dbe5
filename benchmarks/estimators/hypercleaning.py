"""Which labels are wrong? A weight for each training example, by three hypergradients at one price.

    python -m benchmarks.estimators.hypercleaning [--data FOLDER] [--backend numpy|torch|jax] [--out FOLDER]

A share of the training labels, those of T1, is replaced by others at random. Each training example has a
weight between 0 and 1, a hyperparameter, and the weights move down the hypergradient of the loss on clean
validation examples, T2: data hyper-cleaning (Franceschi et al. 2017; Shaban et al. 2019). Compared are, for
the same number of gradients, a second-order product counting two:

    implicit    five training steps, and CG from the last solution: ``hg.Implicit(hg.CG(…))``
    amortised   one training step, and one product: ``hg.Implicit(hg.Amortised(…))``, which is SOBA
    greedy      one training step, and its own response: ``hg.Greedy(…)``

What the weights are worth is measured by the area under the ROC curve, as a test of whether a label is right,
and by the test error of a model that is trained from scratch with them, on T1 and on both T1 and T2. Beside
them stand models trained on all of T1, on its right labels alone, which nobody knows, and on T2 alone. Each
has that penalty of a grid which is best on T2; the last, to its advantage, the one that is best on test.

``--data`` is a folder that has MNIST in ``mnist/``, see ``hypergrad.demo.images``: 10,000 examples are T1,
5,000 are T2. Without it scikit-learn's digits are split 900 : 400 : 497. Rates, steps and the penalty
during tuning were chosen on seed 1000 of MNIST by the area under the curve, and greedy's momentum to be that
of the others; seeds from 0 on are reported.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import optimize

import hypergrad as hg
from benchmarks.shared import report
from benchmarks.shared.data import pooled
from benchmarks.shared.labels import area, corrupt
from benchmarks.shared.networks import cross_entropies, tanh_network
from hypergrad.backend import get_backend
from hypergrad.demo.images import load_images
from hypergrad.testing.calculus import value_and_grad
from hypergrad.tuning.progress import progress

PENALTIES = (1e-4, 1e-3, 1e-2)
"""Of the models that are trained from scratch in the end."""
PRESETS = {
    "smoke": {"budget": 100, "seeds": 1, "iterations": 10},
    "small": {"budget": 1500, "seeds": 3, "iterations": 100},
    "full": {"budget": 10000, "seeds": 5, "iterations": 300},
}
POINTS = 15
"""How often, about, the weights are looked at in a run."""


def methods(rate, damping):
    """By name: a tuner's arguments."""
    online = hg.Checks(away="ignore")
    cg, amortised = hg.Warm(hg.Damped(hg.CG(50, rtol=0.05), damping)), hg.Amortised(rate)
    sgd = hg.SGD(rate, momentum=0.9)
    return {
        "implicit": {"estimator": hg.Implicit(cg, checks=online), "every": 5, "update": sgd},
        "amortised": {"estimator": hg.Implicit(amortised, checks=online), "every": 1, "update": sgd},
        "greedy": {"estimator": hg.Greedy(sgd), "every": 1},
    }


def load(folder, seed):
    """Images and labels of T1, T2 and test."""
    rng = np.random.default_rng((seed, 0))
    if folder:
        found = load_images("mnist", folder)
        x, x_test = (part.reshape(len(part), -1) / 255 for part in (found.x, found.x_test))
        t1, t2 = np.split(rng.permutation(len(x))[:15000], [10000])
        return (x[t1], found.y[t1]), (x[t2], found.y[t2]), (x_test, found.y_test)
    x, y = pooled()
    x = x.reshape(len(x), -1)
    return [(x[rows], y[rows]) for rows in np.split(rng.permutation(len(x)), [900, 1300])]


class Model:
    """Softmax regression, or a net with a hidden layer, in float32."""

    def __init__(self, backend, features, hidden, seed):
        self.backend, self.start = backend, []
        rng, widths = np.random.default_rng((seed, 2)), (features, *hidden, 10)
        for m, n in zip(widths[:-1], widths[1:], strict=True):
            w = rng.normal(size=(m, n)) / np.sqrt(m) if hidden else np.zeros((m, n))
            self.start.append({"w": self.array(w), "b": self.array(np.zeros(n))})

    def array(self, values):
        return self.backend.asarray(np.asarray(values, np.float32))

    def batch(self, x, y):
        return self.array(x), self.array(np.eye(10)[y])

    def logits(self, params, x):
        return tanh_network(self.backend.xp, params, x)

    def losses(self, params, batch):
        return cross_entropies(self.backend.xp, self.logits(params, batch[0]), batch[1])

    def weighted(self, params, weights, batch, penalty):
        """The training loss: its weights are the hyperparameters."""
        squares = sum(self.backend.xp.sum(layer["w"] ** 2) for layer in params)
        return self.backend.xp.mean(weights * self.losses(params, batch)) + penalty * squares

    def mean(self, params, weights, batch):
        """The validation loss."""
        return self.backend.xp.mean(self.losses(params, batch))

    def trained(self, weights, batch, penalty, iterations):
        """Parameters trained from the start with fixed weights, by L-BFGS."""
        flat, unravel = self.backend.ravel(self.start)
        weights = self.array(weights)

        @self.backend.compile
        def value_and_slope(flat, weights, batch):
            return value_and_grad(
                self.backend, lambda flat: self.weighted(unravel(flat), weights, batch, penalty), flat
            )

        def f(point):
            value, slope = value_and_slope(self.array(point), weights, batch)
            return float(value), self.backend.to_numpy(slope).astype(float)

        start = self.backend.to_numpy(flat)
        found = optimize.minimize(f, start, jac=True, method="L-BFGS-B", options={"maxiter": iterations})
        return unravel(self.array(found.x))

    def error(self, params, x, y):
        logits = self.backend.to_numpy(self.logits(params, self.array(x)))
        return float((logits.argmax(1) != y).mean())


def tune(model, arguments, options, penalty, rate, train, val, right, advance):
    """Weights by one method, and its curve: gradients spent, area under the ROC curve, loss on T2."""
    problem = hg.Bilevel(lambda *given: model.weighted(*given, penalty), model.mean)
    tuner = hg.Tuner(problem, space=hg.Interval(0.0, 1.0), hyper_update=hg.Adam(rate), **arguments)
    updates = max(1, round(options["budget"] / POINTS / (tuner.every + 5)))
    weights, resume, curve, steps = model.array(np.full(len(right), 0.5)), None, [], 0
    while not curve or curve[-1][0] < options["budget"]:
        steps += updates * tuner.every
        run = tuner.run(model.start, weights, train, val, steps, resume=resume, progress=False)
        resume = run.state, run.history
        spent, loss = float(run.history.cost[-1]), float(run.history.outer_values[-1])
        curve.append((spent, area(model.backend.to_numpy(run.hparams), right), loss))
        advance(0, f"{spent:.0f} gradients, area {curve[-1][1]:.4f}")
    return model.backend.to_numpy(run.hparams).astype(float), curve


def compare(options, seed, advance):
    """All that is reported of one seed: a row for each set of weights."""
    (x, y), (x2, y2), test = load(options["data"], seed)
    y, right = corrupt(y, options["share"], seed)
    model = Model(get_backend(options["backend"]), x.shape[1], options["hidden"], seed)
    train, val = model.batch(x, y), model.batch(x2, y2)
    both = model.batch(np.concatenate([x, x2]), np.concatenate([y, y2]))
    found = {"all of T1": (np.ones(len(y)), []), "right labels": (right.astype(float), [])}
    for name, arguments in methods(options["rate"], options["damping"]).items():
        rates = options["penalty"], options["hyper_rate"]
        found[name] = tune(model, arguments, options, *rates, train, val, right, advance)
        advance(1, name)

    def best(weights, batch):
        fits = [(model.trained(weights, batch, s, options["iterations"]), s) for s in PENALTIES]
        return min(fits, key=lambda fit: float(model.mean(fit[0], None, val)))

    rows = {}
    for name, (weights, curve) in found.items():
        params, penalty = best(weights, train)
        joined = model.trained(np.concatenate([weights, 0 * y2 + 1]), both, penalty, options["iterations"])
        rows[name] = {
            "area": area(weights, right),
            "kept_right": float(((weights > 0.5) == right).mean()),
            "test_error": model.error(params, *test),
            "test_error_with_t2": model.error(joined, *test),
            "gradients": curve[-1][0] if curve else None,
            "penalty": penalty,
            "curve": curve,
        }
    # T2 cannot choose the penalty of a model trained on it; the best on test is to that model's advantage.
    alone = [model.trained(0 * y2 + 1, val, penalty, options["iterations"]) for penalty in PENALTIES]
    rows["T2 alone"] = dict.fromkeys(rows["all of T1"]) | {
        "test_error_with_t2": min(model.error(params, *test) for params in alone),
        "curve": [],
    }
    return rows


COLUMNS = {
    # key of a row: heading, format of mean and standard error
    "area": ("area under ROC", "{:.4f} ± {:.4f}", 1),
    "kept_right": ("right about labels", "{:.1f} ± {:.1f} %", 100),
    "test_error": ("test error, T1", "{:.2f} ± {:.2f} %", 100),
    "test_error_with_t2": ("T1 and T2", "{:.2f} ± {:.2f} %", 100),
    "gradients": ("gradients", "{:.0f}", 1),
}


def show(title, results):
    headings, table = ["weights", *(heading for heading, _, _ in COLUMNS.values())], []
    for name in results[0]:
        cells = [name]
        for key, (_, form, scale) in COLUMNS.items():
            values = [rows[name][key] for rows in results]
            if None in values or (key in ("area", "kept_right") and not results[0][name]["curve"]):
                cells.append("–")
                continue
            spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(form.format(scale * np.mean(values), scale * spread))
        table.append(cells)
    report.show(title, headings, table, 120)


def plot(path, results):
    """Area under the ROC curve and loss on T2 against gradients spent, and the test errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    areas, losses, errors = figure.subplots(1, 3)
    for i, name in enumerate(results[0]):
        for k, rows in enumerate(results):
            if curve := rows[name]["curve"]:
                spent, under, loss = zip(*curve, strict=True)
                areas.plot(spent, under, color=f"C{i}", label=name if k == 0 else None)
                losses.plot(spent, loss, color=f"C{i}", label=name if k == 0 else None)
        for key, marker in (("test_error", "o"), ("test_error_with_t2", "x")):
            shown = [100 * rows[name][key] for rows in results if rows[name][key] is not None]
            errors.plot(shown, [i] * len(shown), marker, color=f"C{i}")
    areas.set(xlabel="gradients spent", ylabel="area under the ROC curve")
    losses.set(xlabel="gradients spent", ylabel="loss on T2 while tuning", yscale="log")
    errors.set(yticks=range(len(results[0])), yticklabels=results[0])
    errors.set(xlabel="test error, %; dots: T1, crosses: T1 and T2")
    errors.invert_yaxis()
    areas.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--data", type=Path, help="has MNIST in mnist/; without it, scikit-learn's digits")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--share", type=float, default=0.5, help="of labels that are replaced")
    parser.add_argument(
        "--hidden", type=int, nargs="*", default=[], help="widths; none is softmax regression"
    )
    parser.add_argument("--penalty", type=float, default=1e-2, help="L2 strength during tuning")
    parser.add_argument("--damping", type=float, default=0.0, help="of CG; a net is not convex and needs it")
    parser.add_argument("--rate", type=float, default=0.1, help="of training and of the amortised solve")
    parser.add_argument("--hyper-rate", type=float, default=0.1, help="Adam's, on the logits of the weights")
    parser.add_argument("--seeds", type=int, help="how many, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--out", type=Path, help="a folder for hypercleaning.json and .png")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    options = {"data": None} | PRESETS[given["preset"]] | given

    seeds = range(options["seed"], options["seed"] + options["seeds"])
    with progress("cleaning", 3 * len(seeds)) as advance:
        results = [compare(options, seed, advance) for seed in seeds]
    data = "MNIST" if options["data"] else "digits"
    show(f"{data}, {100 * options['share']:.0f} % of labels replaced, {len(seeds)} seeds", results)
    if "out" in options:
        out = options.pop("out")
        about = options | {"data": data, "results": results}
        report.save(out / "hypercleaning.json", about)
        plot(out / "hypercleaning.png", results)


if __name__ == "__main__":
    main()
