"""Training that runs backwards: does it arrive where it began, and how many bits does it remember?

    python -m benchmarks.costs.there_and_back [--backend numpy|torch|jax] [--steps 10000]
        [--momentum 0.5 0.9 0.99]

An MLP 64-320-260-10 with tanh (106,000 weights in float32) is trained on digits by `hg.SGD` with momentum,
and its hypergradient by an L2 strength for each layer is taken with the tape `hg.Reversible`, which compares
what comes back with what was given, bit for bit. Shown are the bits in the log for each weight and step as a
ratio to the log2(1/μ) that cannot be avoided, and the same with the pool, which takes 16 more for each weight
whatever the number of steps.
"""

import argparse
import math
import time
from importlib import import_module

import numpy as np

import hypergrad as hg
from benchmarks.shared.networks import weights
from hypergrad.backend import get_backend
from hypergrad.demo import data as datasets
from hypergrad.demo import network

SIZES = (64, 320, 260, 10)
BATCH = 10
RATE = 0.01
POOL = 16


def there_and_back(backend, steps, momentum):
    """Seconds, and the bytes that were held beside parameters and velocity."""
    like = backend.asarray(np.zeros((), "float32"))
    problem, split = network.bilevel(backend), datasets.load("digits", 0)
    start = weights(np.random.default_rng(0), *SIZES)
    params = backend.map(lambda leaf: backend.asarray(leaf, like=like), start)
    hparams = {
        "log_l2": backend.asarray(np.full(len(params), -8.0), like=like),
        "noise": backend.asarray(0.0, like=like),
    }
    size = len(split.train.x) // BATCH * BATCH
    x, y = (backend.asarray(part[:size], like=like) for part in split.train)
    rest = {"noise": backend.asarray(np.zeros((BATCH, SIZES[0])), like=like)}

    def batch(t):
        k = t * BATCH % size  # traced in JAX, a number elsewhere
        return rest | {"x": part(x, k), "y": part(y, k)}

    def part(whole, k):
        return (
            import_module("jax").lax.dynamic_slice_in_dim(whole, k, BATCH)
            if backend.compiles
            else whole[k : k + BATCH]
        )

    rule = hg.SGD(RATE, momentum=momentum)
    estimator = hg.Unrolled(rule, steps, tape=hg.Reversible())
    val = {"x": backend.asarray(split.val.x, like=like), "y": backend.asarray(split.val.y, like=like)}
    state = estimator.init(problem, params, hparams)
    run = backend.compile(lambda state, hparams: estimator.estimate(problem, state, hparams, batch, val))
    begin = time.perf_counter()
    out = estimator.check(run(state, hparams))  # raises if what came back is not what was given
    seconds = time.perf_counter() - begin
    count = sum(m * n + n for m, n in zip(SIZES, SIZES[1:], strict=False))
    return seconds, 8 * int(out.report.bytes_held) / count - 2 * 32 - POOL, float(out.outer_value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--momentum", type=float, nargs="*", default=[0.5, 0.9, 0.99])
    options = parser.parse_args()
    backend = get_backend(options.backend)
    print(f"{options.backend}, {options.steps} steps: every bit of θ_0 and b_0 came back")
    columns = (
        f"{'bits':>8} {'a step':>8} {'log2(1/μ)':>10} {'ratio':>7} {'+ pool':>7} {'seconds':>8} {'T2':>8}"
    )
    print(f"{'momentum':>8} {columns}")
    for momentum in options.momentum:
        seconds, bits, loss = there_and_back(backend, options.steps, momentum)
        each, floor = bits / options.steps, math.log2(1 / momentum)
        pooled = (bits + POOL) / options.steps / floor
        figures = f"{bits:8.0f} {each:8.4f} {floor:10.4f} {each / floor:7.3f} {pooled:7.3f} {seconds:8.1f}"
        print(f"{momentum:8g} {figures} {loss:8.4f}", flush=True)


if __name__ == "__main__":
    main()
