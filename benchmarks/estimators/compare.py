"""Estimators, problems and backends side by side, on equal budgets of gradients.

    python -m benchmarks.estimators.compare [--preset smoke|small] [--problems NAME …]
        [--backends jax torch numpy] [--data FOLDER] [--out FOLDER]

Every method begins at the same poor hyperparameters and spends the same number of training gradients, a
second-order product counting two. What it has found is judged in one way for all: by models trained from the
start with the hyperparameters fixed. README.md says how to read the table, and what is fair about it.

The first backend runs everything: each rate of the hyper-optimiser on seeds that are not reported, then the
best of them on those that are. The others run the first reported seed at the same rates. The bias is measured
on NumPy.
"""

import argparse
import platform
import warnings
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from benchmarks.estimators.comparison.bias import biases
from benchmarks.estimators.comparison.methods import roster
from benchmarks.estimators.comparison.problem import Options
from benchmarks.estimators.comparison.problems import PROBLEMS
from benchmarks.estimators.comparison.race import later, race, settled
from benchmarks.estimators.comparison.report import draw, markdown, show
from benchmarks.shared.report import plain, save
from hypergrad.backend import get_backend
from hypergrad.errors import SolveWarning
from hypergrad.tuning.progress import progress

PRESETS = {
    "smoke": {
        "steps": 10,
        "budget": 5,
        "examples": 100,
        "rates": 1,
        "tuning": [1000],
        "seeds": [0],
        "points": 2,
        "reruns": 1,
        "places": 2,
    },
    "small": {
        "steps": 200,
        "budget": 30,
        "examples": 500,
        "rates": 8,
        "tuning": [1000, 1001],
        "seeds": [0, 1, 2],
        "points": 8,
        "reruns": 2,
        "places": 5,
    },
}
"""Rates are chosen on the seeds of ``tuning``, and what is found at them is reported on others."""
PACKAGES = ("hypergradients", "numpy", "autograd", "torch", "jax", "optuna")


def compare(problem, options, chosen, advance):
    """Records of all methods on a problem: by name, its rates and its seeds."""
    records, tuning = {}, options["tuning"]
    seeds = options["seeds"] if chosen is None else options["seeds"][:1]
    samples = {seed: problem.sample(seed) for seed in (*tuning, *seeds)}
    points, reruns = options["points"] if chosen is None else 2, options["reruns"]
    for name, method in roster(problem).items():
        advance(0, f"{problem.name}: {name}")
        if problem.backend.compiles:  # before any clock runs
            deque(islice(method.points(problem, samples[tuning[0]], 0.0), 4), 0)
        tried, rate = [], (chosen or {}).get(name)
        if method.tunes and chosen is None:

            def loss(rate, method=method):
                runs = (race(problem, method, samples[seed], rate, min(points, 5), reruns) for seed in tuning)
                return sum(later(record) for record in runs) / len(tuning)

            tried = settled(loss, options["rates"])
            rate = min(tried, key=lambda row: row["val_loss"])["rate"]
        found = [race(problem, method, samples[seed], rate, points, reruns) for seed in seeds]
        records[name] = {"tried": tried, "seeds": found}
        advance(1, f"{problem.name}: {name}")
    about = {"title": problem.title, "source": problem.source, "data": problem.data}
    about |= {"count": problem.count, "steps": problem.steps, "budget": problem.runs * problem.steps}
    return about | {"methods": records}


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--backends", nargs="+", default=["numpy"])
    parser.add_argument("--data", type=Path, help="has mnist/; without it, scikit-learn's digits")
    parser.add_argument("--out", type=Path, help="a folder for compare.json and the pictures")
    arguments = parser.parse_args()
    options, results = PRESETS[arguments.preset], {}
    warnings.filterwarnings("ignore", category=SolveWarning)  # of solves that fail, and are part of it
    size = Options(options["steps"], options["budget"], options["examples"], arguments.data)
    with progress("comparing", 10 * len(arguments.problems) * len(arguments.backends)) as advance:
        for name in arguments.problems:
            results[name], chosen = {}, None
            for backend in arguments.backends:
                problem = PROBLEMS[name](get_backend(backend), size)
                found = results[name][backend] = compare(problem, options, chosen, advance)
                if chosen is None:
                    chosen = {key: row["seeds"][0]["rate"] for key, row in found["methods"].items()}
                    advance(0, f"{name}: bias")
                    # On the reference backend, which compiles nothing for runs of each length.
                    problem = PROBLEMS[name](get_backend("numpy"), size)
                    found["bias"] = biases(problem, options["seeds"][0], options["places"])
            show(results[name])
            if arguments.out:
                about = {"preset": arguments.preset, "options": options, "versions": versions()}
                about |= {"problems": plain(results)}
                save(arguments.out / "compare.json", about)
                (arguments.out / f"{name}.md").write_text(markdown(results[name]))
                draw(arguments.out / f"{name}.png", results[name])


if __name__ == "__main__":
    main()
