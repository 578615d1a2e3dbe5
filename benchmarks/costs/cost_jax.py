"""The rows of ``cost.py`` for JAX: whole estimates under ``jax.jit``."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import hypergrad as hg
from benchmarks.costs.nets.in_jax import (
    Compiled,
    batch_of,
    cross_entropy,
    logits,
    outer,
    parameters,
    with_l2,
    with_many,
    with_noise,
)
from benchmarks.costs.row import Figure, Row
from benchmarks.shared.timing import Program

UNROLL, PRODUCTS, PERIOD, LONG = 10, 10, 10, 32
RATE, EXACT = 0.01, hg.Exact()


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

    def implicit(solver, count=lambda once: once, products=EXACT):
        estimator = hg.Implicit(solver, products=products, checks=hg.Checks(away="ignore"))
        return estimate(with_noise, params, noise, estimator, train, val, count)

    def terms(products=EXACT):
        alone = implicit(hg.Identity(), products=products)  # no product but those after the solve
        count = lambda seen: alone.flops + (PRODUCTS - 1) * (seen - alone.flops)  # noqa: E731
        return implicit(hg.Neumann(PRODUCTS - 1, step_size=1e-3), count, products)

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
