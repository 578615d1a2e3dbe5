"""What T1−T2 costs: its time over that of plain training, as a ratio, and the paper's ≈ 30 %.

    python -m benchmarks.paper.overhead [--preset smoke|small|paper] [--data FOLDER] [--backend torch]

Three programs train the same network from the same state: with λ fixed, with an update of λ at every 10th
step, and at every step. They are timed in turn, over and over; the ratios are the median of those of each
round, with the smallest and the largest quarter left out of the range. From every step comes what a
hypergradient costs in training steps.
"""

import numpy as np

from benchmarks.paper import data
from benchmarks.paper.data import BATCH
from benchmarks.paper.lab import EVERY
from benchmarks.paper.methods import FIRST, METHODS
from benchmarks.paper.report import report
from benchmarks.shared.timing import clock


def programs(lab, setting, steps):
    """By method and how often λ moves, a function that trains so many steps and waits for the end."""
    ops, net, start = lab.ops, setting.net(lab.images.shape), setting.random(lab.seed, lab.images.shape)
    params, aux = net.start(lab.seed)
    params, aux, hparams = (ops.backend.map(ops.array, tree) for tree in (params, aux, start))
    rows = data.split(lab.images, *lab.preset.size, lab.seed)
    rng, x, labels = np.random.default_rng(lab.seed), lab.images.x - rows.centre, lab.images.y

    def batches(part):
        picked = [rng.choice(part, BATCH) for _ in range(8)]
        return [(ops.array(x[k]), ops.one_hot(ops.array(labels[k].astype(np.int32)))) for k in picked]

    key = ops.key(lab.seed)
    train = [(*batch, ops.draw(key, k)) for k, batch in enumerate(batches(rows.t1))]
    val = batches(rows.t2)

    def timed(tuner):
        def run():
            done = tuner.run(params, hparams, train, val, steps, progress=False, aux=aux, backend=ops.backend)
            return np.asarray(ops.backend.to_numpy(done.params[0]["b"]))

        return run

    chosen = [(method, every) for method in (FIRST, METHODS[-1]) for every in (EVERY, 1)]
    tuners = {(method.name, every): lab.tuner(setting, method, every) for method, every in chosen}
    return {name: timed(tuner) for name, tuner in {"plain": lab.tuner(setting, None), **tuners}.items()}


def study(lab):
    numbers, rows = {}, []
    steps = min(20 * EVERY, lab.total)
    for setting in lab.settings[:2]:
        run = programs(lab, setting, steps)
        for each in run.values():
            each()  # compiles
        spent = {name: [] for name in run}
        for repeat in range(lab.preset.repeats):
            for name, each in run.items():
                spent[name].append(clock(each))
                about = {"setting": setting.name, "program": str(name), "repeat": repeat}
                rows.append(about | {"seconds": spent[name][-1]})
        plain = np.array(spent.pop("plain"))
        for (method, every), seconds in spent.items():
            low, mid, high = np.quantile(np.array(seconds) / plain, [0.25, 0.5, 0.75])
            numbers[f"{setting.name}, {method}, every {every}"] = (
                f"{mid:.2f} [{low:.2f}, {high:.2f}] times the time of plain training"
                + (f"; a hypergradient costs {mid - 1:.2f} training steps" if every == 1 else "")
            )
    lab.logs.table("overhead", rows)
    return numbers


def main() -> None:
    report("overhead", __doc__, study)


if __name__ == "__main__":
    main()
