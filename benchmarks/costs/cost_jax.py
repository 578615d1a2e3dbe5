"""The rows of ``cost.py`` for JAX: whole estimates under ``jax.jit``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cost import Figure, Program, Row
from jax import lax, random

import hypergrad as hg

IN, OUT, UNROLL, PRODUCTS, PERIOD, LONG = 784, 10, 10, 10, 10, 32
RATE = 0.01


def versions() -> dict[str, Any]:
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


@dataclass(frozen=True)
class Compiled:
    """A program with its arguments. XLA counts a loop's body once; ``count`` makes all rounds of that."""

    f: Callable[..., Any]
    args: tuple[Any, ...]
    count: Callable[[float], float] = field(default=lambda once: once)

    @cached_property
    def program(self) -> Any:
        return jax.jit(self.f).lower(*self.args).compile()

    def __call__(self) -> Any:
        return self.program(*self.args)

    @property
    def flops(self) -> float:
        return self.count(self.program.cost_analysis()["flops"])

    @property
    def memory(self) -> int:
        """Bytes of temporary memory."""
        return self.program.memory_analysis().temp_size_in_bytes


def flops(program: Any) -> float:
    return program.flops


def wait(result: Any) -> None:
    jax.block_until_ready(result)


def parameters(width: int) -> dict[str, Any]:
    sizes = [IN, width, width, width, OUT]
    pairs = list(zip(sizes, sizes[1:], strict=False))
    keys = random.split(random.key(0), len(pairs))
    weights = {f"w{k}": random.normal(keys[k], (m, n)) / m**0.5 for k, (m, n) in enumerate(pairs)}
    return weights | {f"b{k}": jnp.zeros(n) for k, (_, n) in enumerate(pairs)}


def logits(params, x, noise=None, key=None):
    for k in range(4):
        if noise is not None:
            x = x + noise[k] * random.normal(random.fold_in(key, k), x.shape)
        x = x @ params[f"w{k}"] + params[f"b{k}"]
        x = jax.nn.relu(x) if k < 3 else x
    return x


def cross_entropy(outputs, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1))


def outer(params, hparams, batch):
    return cross_entropy(logits(params, batch["x"]), batch["y"])


def with_l2(params, hparams, batch):
    """One strength for each layer."""
    strengths = jnp.exp(hparams)
    return outer(params, hparams, batch) + sum(strengths[k] * jnp.sum(params[f"w{k}"] ** 2) for k in range(4))


def with_noise(params, hparams, batch):
    """Gaussian noise at the input of each layer, one level for each; its key comes with the batch."""
    return cross_entropy(logits(params, batch["x"], hparams, batch["key"]), batch["y"])


def with_many(params, hparams, batch):
    """A strength for all weights of the second layer, for each of its rows, or for each weight."""
    return outer(params, hparams, batch) + jnp.sum(jnp.exp(hparams) * params["w1"] ** 2)


def batch_of(size, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, IN)), jnp.float32)
    return {"x": x, "y": jnp.asarray(rng.integers(OUT, size=size)), "key": random.key(seed)}


def gradient(loss, params, hparams, batch) -> Program:
    return Compiled(lambda p, h, b: jax.grad(loss)(p, h, b), (params, hparams, batch))


def estimate(loss, params, hparams, estimator, train, val, count=lambda once: once) -> Program:
    """One estimate from fresh parameters, each training step on the same batch."""
    problem = hg.Bilevel(loss, outer)

    def whole(params, hparams, train, val):
        state = estimator.init(problem, params, hparams)
        return estimator.estimate(problem, state, hparams, lambda t: train, val)

    return Compiled(whole, (params, hparams, train, val), count)


def unrolled(params, noise, steps, tape, train, val) -> Program:
    once = gradient(outer, params, noise, val)
    # Each loop's body is counted once; ∇C2 is taken once in any case.
    count = lambda seen: once.flops + steps * (seen - once.flops)  # noqa: E731
    return estimate(with_noise, params, noise, hg.Unrolled(hg.SGD(RATE), steps, tape=tape), train, val, count)


def forward(params, noise, steps, train, val) -> Program:
    """As many tangents as there are numbers in λ; a scan's body is counted once here, too."""
    once = gradient(outer, params, noise, val)
    count = lambda seen: once.flops + steps * (seen - once.flops)  # noqa: E731
    return estimate(with_noise, params, noise, hg.Forward(hg.SGD(RATE), steps), train, val, count)


def plain_unroll(params, noise, steps, train, val) -> Program:
    """The same steps by ``jax.grad`` through a ``lax.scan``, without a check or a report."""

    def final(noise, params, train, val):
        def step(params, _):
            slope = jax.grad(with_noise)(params, noise, train)
            return jax.tree.map(lambda p, g: p - RATE * g, params, slope), None

        return outer(lax.scan(step, params, None, steps)[0], noise, val)

    once = gradient(outer, params, noise, val)
    count = lambda seen: once.flops + steps * (seen - once.flops)  # noqa: E731
    return Compiled(jax.value_and_grad(final), (noise, params, train, val), count)


def rows(width: int, size: int, compiled: bool) -> list[Row]:
    params, train, val = parameters(width), batch_of(size, 0), batch_of(size, 1)
    l2, noise = jnp.full(4, -6.0), jnp.full(4, 0.1)
    g_l2, g_noise = gradient(with_l2, params, l2, train), gradient(with_noise, params, noise, train)
    greedy = hg.Greedy(hg.SGD(RATE))
    step_l2 = estimate(with_l2, params, l2, greedy, train, val)
    step_noise = estimate(with_noise, params, noise, greedy, train, val)
    shapes = {"1": (), "10³": (width,), "10⁶": (width, width)}
    strengths = {n: jnp.full(shape, -6.0) for n, shape in shapes.items()}
    many = {n: estimate(with_many, params, h, greedy, train, val) for n, h in strengths.items()}

    def implicit(solver, count=lambda once: once, curvature=None):
        estimator = hg.Implicit(solver, tolerance=None, curvature=curvature)
        return estimate(with_noise, params, noise, estimator, train, val, count)

    def terms(curvature=None):
        alone = implicit(hg.Identity(), curvature=curvature)  # no product but those after the solve
        count = lambda seen: alone.flops + (PRODUCTS - 1) * (seen - alone.flops)  # noqa: E731
        return implicit(hg.Neumann(PRODUCTS - 1, step_size=1e-3), count, curvature)

    gauss_newton = hg.GaussNewton(
        lambda p, h, b: logits(p, b["x"], h, b["key"]), lambda f, h, b: cross_entropy(f, b["y"])
    )
    full, states = (unrolled(params, noise, UNROLL, tape, train, val) for tape in (hg.Full(), hg.States()))
    plain = plain_unroll(params, noise, UNROLL, train, val)

    def training(params):
        def step(params, _):
            slope = jax.grad(with_l2)(params, l2, train)
            return jax.tree.map(lambda p, g: p - RATE * g, params, slope), None

        return lax.scan(step, params, None, PERIOD**2)[0]

    def by_hand(params):
        """T1−T2 without a check, a report or a history."""

        def train_once(params, hparams):
            slope = jax.grad(with_l2)(params, hparams, train)
            return jax.tree.map(lambda p, g: p - RATE * g, params, slope)

        def one_round(carry, _):
            params, hparams = carry
            params = lax.scan(lambda p, _: (train_once(p, hparams), None), params, None, PERIOD - 1)[0]
            params, back = jax.vjp(partial(train_once, params), hparams)
            (response,) = back(jax.grad(outer)(params, hparams, val))
            return (params, hparams - RATE * response), None

        return lax.scan(one_round, (params, l2), None, PERIOD)[0]

    tuner = hg.Tuner(hg.Bilevel(with_l2, outer), greedy, every=PERIOD)
    trained = Compiled(training, (params,))
    return [
        Row("Greedy, L2, extra over the training gradient", step_l2, g_l2, less=1, flops=1.02),
        Row("Greedy, noise, extra", step_noise, g_noise, less=1, flops=2.38),
        Row("Greedy, L2, whole step", step_l2, g_l2, seconds=2.05),
        Row("Greedy, noise, whole step", step_noise, g_noise, seconds=3.4),
        Row("Greedy, 10³ penalties against 1", many["10³"], many["1"], seconds=1.05),
        Row("Greedy, 10⁶ penalties against 1", many["10⁶"], many["1"], seconds=1.05),
        Row(
            f"Tuner.run, L2, every={PERIOD}, {PERIOD**2} steps, against a scan of training alone",
            lambda: tuner.run(params, l2, train, val, PERIOD**2).params,
            trained,
            seconds=1.11,
            counted=False,
        ),
        Row("  the same by hand", Compiled(by_hand, (params,)), trained, counted=False),
        Row(
            f"Implicit, K = {PRODUCTS} products, per 2 + 2.1 K",
            terms(),
            g_noise,
            per=2 + 2.1 * PRODUCTS,
            flops=1.0,
        ),
        Row(
            f"Implicit, Gauss-Newton, K = {PRODUCTS}, and its mixed term, per 4.1 + 1.75 K",
            terms(gauss_newton),
            g_noise,
            per=4.1 + 1.75 * PRODUCTS,
            flops=1.0,
        ),
        Row(f"Unrolled, Full, T = {UNROLL}, a step", full, g_noise, UNROLL, 1, flops=3.0),
        Row(f"Unrolled, States, T = {UNROLL}, a step", states, g_noise, UNROLL, 1, flops=3.8),
        Row(
            "Forward, 4 hyperparameters, per (1 + 2·4) T",
            forward(params, noise, UNROLL, train, val),
            g_noise,
            9 * UNROLL,
            1,
            flops=1.0,
        ),
        Row(f"  jax.grad through a scan of the same {UNROLL} steps, a step", plain, g_noise, UNROLL, 1),
        Row("Unrolled, Full, against jax.grad through a scan", full, plain, seconds=1.0),
        Row("Unrolled, States, against jax.grad through a scan", states, plain, seconds=1.0),
    ]


def figures(width: int, size: int) -> list[Figure]:
    """Temporary memory, in copies of z, which here is θ."""
    params, noise = parameters(width), jnp.full(4, 0.1)
    z = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def memory(make, steps, size, *tape):
        train, val = batch_of(size, 0), batch_of(size, 1)
        return make(params, noise, steps, *tape, train, val).memory / z

    found = []
    for name, target, *make in (
        ("Unrolled, States", 1.05, unrolled, hg.States()),
        ("Unrolled, Full", None, unrolled, hg.Full()),
        ("jax.grad through a scan", None, plain_unroll),
    ):
        far, near = (memory(make[0], steps, size, *make[1:]) for steps in (LONG, LONG // 2))
        found.append(Figure(f"{name}: memory, |z| a step", (far - near) / (LONG - LONG // 2), "≤", target))
    for many in (size, 20 * size):
        plain = memory(plain_unroll, LONG, many)
        for name, tape in (("States", hg.States()), ("Binomial(4)", hg.Binomial(4))):
            ratio = plain / memory(unrolled, LONG, many, tape)
            label = f"memory at T = {LONG}, batch {many}: jax.grad through a scan / {name}"
            found.append(Figure(label, ratio, "≥", 5.0))
    return found
