"""Does T1−T2 rescue a poor start? Tuned against fixed training from random poor regularisation.

    python -m benchmarks.estimators.poor_starts [--starts 20] [--steps 600] [--out FILE.json]

From each start (input noise and one L2 strength for both layers, drawn from the poor ends of their
ranges) the network of ``hypergrad compare`` is trained twice for the same number of steps: with the
hyperparameters fixed, and tuned by greedy at every 10th step. After figure 4 of Luketina et al. 2016.
"""

import argparse
from pathlib import Path

import numpy as np

import hypergrad as hg
from benchmarks.shared.report import save
from benchmarks.shared.training import trained
from hypergrad.backend import get_backend
from hypergrad.demo import network
from hypergrad.demo.data import load

RULE = hg.SGD(0.05, momentum=0.9)
SPACE = {"log_l2": hg.Real(), "noise": hg.Positive("softplus")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    backend, rows = get_backend("numpy"), []
    problem = network.bilevel(backend)
    tuner = hg.Tuner(problem, hg.Greedy(RULE), SPACE, hg.Adam(0.2), every=10)
    print(f"{'start':>5} {'log L2':>7} {'noise':>6} {'fixed':>8} {'tuned':>8}   end: log L2, noise")
    for seed in range(options.starts):
        rng, data = np.random.default_rng(seed), load("digits", seed)
        start = network.init_hparams(backend, rng.uniform(-3.0, -1.0), rng.uniform(1.0, 3.0))
        params = network.init_params(backend, data.train, seed)
        train = network.minibatches(backend, data.train, 100, seed)
        val = network.minibatches(backend, data.val, 100, seed + 1)
        fixed = trained(backend, problem, RULE, params, start, train, options.steps)
        tuned = tuner.run(params, start, train, val, options.steps, progress=False)
        errors = [network.error_rate(backend, p, data.test) for p in (fixed, tuned.params)]
        rows.append(
            {
                "log_l2": float(start["log_l2"][0]),
                "noise": float(start["noise"]),
                "fixed": errors[0],
                "tuned": errors[1],
                "end_log_l2": tuned.hparams["log_l2"].tolist(),
                "end_noise": float(tuned.hparams["noise"]),
            }
        )
        end = " ".join(f"{x:.1f}" for x in (*rows[-1]["end_log_l2"], rows[-1]["end_noise"]))
        print(
            f"{seed:5d} {rows[-1]['log_l2']:7.2f} {rows[-1]['noise']:6.2f} "
            f"{100 * errors[0]:6.1f} % {100 * errors[1]:6.1f} %   {end}",
            flush=True,
        )
    fixed, tuned = (np.array([row[kind] for row in rows]) for kind in ("fixed", "tuned"))
    print(f"mean test error: fixed {100 * fixed.mean():.1f} %, tuned {100 * tuned.mean():.1f} %")
    print(f"worst:           fixed {100 * fixed.max():.1f} %, tuned {100 * tuned.max():.1f} %")
    print(f"share of starts improved: {np.mean(tuned < fixed):.2f}")
    if options.out:
        save(options.out, rows)


if __name__ == "__main__":
    main()
