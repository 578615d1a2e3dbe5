"""Learn a learning-rate schedule, one rate for each step and layer, by the hypergradient of a training run.

    python -m benchmarks.estimators.learned_schedule [--shared] [--backend numpy|torch|jax]
        [--plot FILE] [--out FILE]

A small network is trained on scikit-learn's digits for a fixed number of steps by SGD with momentum, from a
new random start and with new minibatches in every meta-step, and Adam moves the logarithm of every rate down
the hypergradient of the validation loss at the end. With ``--shared`` the layers share a rate in each step:
that is ``hg.SGD`` with an ``hg.Schedule``, whose run ``hg.Reversible`` takes back exactly; a rate for each
layer is an update rule of its own, with ``hg.Binomial``.

What was learned is then compared with the best constant rate and the best linear decay on random starts and
minibatches that learning has not seen. Their rates are chosen on those same starts, to their own advantage;
the learned schedule is not. The minibatches of 10 and three hidden layers were chosen on seed 0, where
learning gains most: with minibatches of 50 and one or two layers it gained nothing or little over a constant
rate. Other seeds are untouched by that choice. After section 3.1 of Maclaurin, Duvenaud and Adams 2015.
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import hypergrad as hg
from benchmarks.shared.networks import cross_entropies, tanh_network, weights
from benchmarks.shared.report import save
from benchmarks.shared.training import compiled
from hypergrad.backend import get_backend
from hypergrad.backend.vectors import nbytes
from hypergrad.demo.data import load
from hypergrad.updates import UpdateRule

MOMENTUM, SLOTS = 0.9, 10
GRID = np.geomspace(1e-3, 1.0, 31)
LEARNING, HELD_OUT = 1, 2
"""Streams of random numbers: the starts and minibatches of meta-steps, and those of the comparison."""


@dataclass(frozen=True)
class LayerwiseSGD(UpdateRule):
    """Momentum SGD with ``hparams["lr"][step]`` a vector, a rate for each layer."""

    momentum: float

    leafwise = True

    def init(self, backend, params):
        return backend.zeros(params)

    def update(self, backend, gradient, opt_state, params, hparams, step):
        velocity = backend.axpy(self.momentum, opt_state, gradient)
        rates = hparams["lr"][step]
        moved = [
            backend.axpy(-rates[i], direction, layer)
            for i, (layer, direction) in enumerate(zip(params, velocity, strict=True))
        ]
        return moved, velocity


class Network:
    """Copies of a tanh network that train side by side, each from its own start on its own minibatches."""

    def __init__(self, backend, data, hidden, batch):
        self.backend, self.data, self.batch = backend, data, batch
        self.widths = (data.train.x.shape[1], *hidden, data.train.y.shape[1])
        self.x, self.y = backend.asarray(data.train.x), backend.asarray(data.train.y)
        self.val = tuple(backend.asarray(part) for part in data.val)
        self.problem = hg.Bilevel(self.inner, self.outer)

    def start(self, copies, seed):
        """Weights at random with variance 1/inputs, biases zero."""
        start = weights(np.random.default_rng((*seed, 0)), *self.widths, copies=copies)
        return self.backend.map(self.backend.asarray, start)

    def minibatches(self, copies, steps, seed):
        """For each step the examples that each copy sees."""
        rng, size = np.random.default_rng((*seed, 1)), len(self.data.train.x)
        drawn = (rng.integers(size, size=(copies, self.batch)) for _ in range(steps))
        return [{"rows": self.backend.asarray(rows)} for rows in drawn]

    def logits(self, params, x):
        return tanh_network(self.backend.xp, params, x)

    def losses(self, params, x, y):
        """Cross-entropy of each copy."""
        xp = self.backend.xp
        return xp.mean(cross_entropies(xp, self.logits(params, x), y), axis=-1)

    def inner(self, params, hparams, batch):
        # The sum, so that each copy has the gradient that it would have alone.
        rows = batch["rows"]
        return self.backend.xp.sum(self.losses(params, self.x[rows], self.y[rows]))

    def outer(self, params, hparams, val):
        return self.backend.xp.mean(self.losses(params, *val))

    def judge(self, params):
        """Validation loss, test loss and test accuracy of each copy."""
        to_numpy, asarray = self.backend.to_numpy, self.backend.asarray
        x, y = asarray(self.data.test.x), asarray(self.data.test.y)
        right = to_numpy(self.logits(params, x)).argmax(-1) == self.data.test.y.argmax(-1)
        losses = (to_numpy(self.losses(params, *part)) for part in (self.val, (x, y)))
        return dict(zip(("val", "test", "accuracy"), (*losses, right.mean(-1)), strict=True))


def learn(network, rule, tape, rates, options):
    """Learned rates, the validation loss in each meta-step, and the bytes that the tape held."""
    backend, steps, copies = network.backend, options.steps, options.copies
    estimator = hg.Unrolled(rule, steps, tape=tape)
    # Positive moves the logarithm. The first hypergradients are by far the largest: Adam is to forget them.
    adam = hg.Adam(options.meta_rate, beta2=0.99)
    tuner = hg.Tuner(network.problem, estimator, {"lr": hg.Positive()}, adam, restart=True)
    begin = partial(network.start, copies)
    state = tuner.init(begin((options.seed, LEARNING, 0)), {"lr": backend.asarray(rates)})
    losses = []
    for k in range(options.meta_steps):
        seed = (options.seed, LEARNING, k)
        fresh = estimator.init(network.problem, begin(seed), tuner.hparams(state))
        train = network.minibatches(copies, steps, seed)
        state, done = tuner.step(state._replace(start=fresh), train, network.val)
        losses.append(float(done.estimate.outer_value))
        if k % 10 == 0 or k == options.meta_steps - 1:
            print(f"meta-step {k:3d}: validation loss {losses[-1]:.4f}", flush=True)
    held = int(done.estimate.report.bytes_held)
    return backend.to_numpy(tuner.hparams(state)["lr"]), losses, held


def trainer(network, rule, options):
    """A function from rates to what comes of training by them, on starts that learning has not seen."""
    backend, steps, seed = network.backend, options.steps, (options.seed, HELD_OUT)
    params = network.start(options.held_out, seed)
    batches = backend.stack(network.minibatches(options.held_out, steps, seed))
    train = compiled(backend, network.problem, rule, steps)
    return lambda rates: network.judge(train(params, {"lr": backend.asarray(rates)}, batches))


def best(name, shape, scores):
    """The best of a grid of multiples of a schedule, by its validation loss."""
    with np.errstate(over="ignore"):  # the largest rates diverge, and are meant to
        found = [scores(rate * shape) for rate in GRID]
    k = int(np.argmin([np.inf if np.isnan(row["val"]).any() else row["val"].mean() for row in found]))
    return f"{name}, {GRID[k]:.3g}", GRID[k] * shape, found[k]


def spread(values, digits=4, scale=1):
    return (
        f"{scale * values.mean():.{digits}f} ± {scale * values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"
    )


def plot(path, contenders, losses):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    schedule, progress = figure.subplots(1, 2)
    _, constant, decay, (_, learned, _) = contenders
    for (name, rates, _), style in ((constant, "--"), (decay, ":")):
        schedule.plot(rates[:, 0] if rates.ndim > 1 else rates, color="gray", ls=style, label=name)
    for i, column in enumerate(learned.T if learned.ndim > 1 else [learned]):
        schedule.plot(column, label=f"learned, layer {i + 1}" if learned.ndim > 1 else "learned")
    schedule.set(xlabel="training step", ylabel="learning rate", yscale="log")
    progress.plot(losses, label="learning")
    for (name, _, row), style in ((constant, "--"), (decay, ":")):
        progress.axhline(row["val"].mean(), color="gray", ls=style, label=f"{name}, held-out starts")
    progress.set(xlabel="meta-step", ylabel="validation loss after training", yscale="log")
    for axes in (schedule, progress):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--shared", action="store_true", help="one rate for all layers; Reversible")
    parser.add_argument("--steps", type=int, default=100, help="training steps, the budget")
    parser.add_argument("--meta-steps", type=int, default=50)
    parser.add_argument("--meta-rate", type=float, default=0.1, help="Adam's, on the logarithms")
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 32, 32], help="widths of hidden layers")
    parser.add_argument("--batch", type=int, default=10, help="examples in a minibatch")
    parser.add_argument("--start", type=float, default=0.01, help="the rate to begin with")
    parser.add_argument("--copies", type=int, default=8, help="random starts averaged in a meta-step")
    parser.add_argument("--held-out", type=int, default=20, help="random starts of the comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    began = time.perf_counter()
    backend = get_backend(options.backend)
    network = Network(backend, load("digits", options.seed), options.hidden, options.batch)
    if options.shared:
        rule = hg.SGD(hg.Schedule(lambda h, t: h["lr"][t]), momentum=MOMENTUM)
        tape, shape = hg.Reversible(), np.ones(options.steps)
    else:
        rule, tape = LayerwiseSGD(MOMENTUM), hg.Binomial(SLOTS)
        shape = np.ones((options.steps, len(network.widths) - 1))
    learned, losses, held = learn(network, rule, tape, options.start * shape, options)
    taught = time.perf_counter() - began

    scores = trainer(network, rule, options)
    decay = 1 - np.arange(options.steps) / options.steps
    contenders = [
        (f"start, {options.start:g}", options.start * shape, scores(options.start * shape)),
        best("best constant", shape, scores),
        best("best linear decay", (shape.T * decay).T, scores),
        ("learned", learned, scores(learned)),
    ]
    print(f"{'':26} {'validation loss':18} {'test loss':18} {'test accuracy, %'}")
    for name, _, row in contenders:
        losses_shown = f"{spread(row['val']):18} {spread(row['test']):18}"
        print(f"{name:26} {losses_shown} {spread(row['accuracy'], 2, 100)}")
    for name, _, row in contenders[:-1]:
        gain = row["val"] - contenders[-1][2]["val"]
        print(f"learned below {name}: {spread(gain)}, on {np.sum(gain > 0)} of {len(gain)} starts")
    spent = time.perf_counter() - began
    print(f"{taught:.0f} s to learn, {spent - taught:.0f} s to compare, with {options.backend}")
    copies = held / nbytes(backend, network.start(options.copies, (0,)))
    print(f"{tape} held {held / 1e6:.2f} MB, {copies:.1f} times the parameters")
    if options.out:
        rows = [
            {"name": name, "rates": rates.tolist()} | {key: value.tolist() for key, value in row.items()}
            for name, rates, row in contenders
        ]
        about = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
        }
        save(options.out, about | {"losses": losses, "rows": rows})
    if options.plot:
        plot(options.plot, contenders, losses)


if __name__ == "__main__":
    main()
