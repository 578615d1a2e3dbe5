"""Functions of JAX with a rule of their own or with control flow, inside the losses."""

from functools import cache, partial

import pytest

from support.reality import BATCH, HPARAMS, PARAMS, VAL, Reality, asarrays, fit

jax = pytest.importorskip("jax")
jnp, lax = jax.numpy, jax.lax


@jax.custom_vjp
def log1pexp(x):
    return jnp.where(x > 0, x + jnp.log1p(jnp.exp(-jnp.abs(x))), jnp.log1p(jnp.exp(jnp.minimum(x, 0))))


log1pexp.defvjp(lambda x: (log1pexp(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))


@jax.custom_vjp
def scaled_tanh(x, scale):
    return jnp.tanh(scale * x)


def scaled_tanh_forward(x, scale):
    y = jnp.tanh(scale * x)
    return y, (x, scale, y)


def scaled_tanh_backward(residuals, g):
    x, scale, y = residuals
    slope = g * (1 - y * y)
    return slope * scale, jnp.sum(slope * x)


scaled_tanh.defvjp(scaled_tanh_forward, scaled_tanh_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def through(f, x, power):
    return f(x) ** power


def through_backward(f, power, x, g):
    y, pullback = jax.vjp(f, x)
    return pullback(g * power * y ** (power - 1))


through.defvjp(lambda f, x, power: (through(f, x, power), x), through_backward)


@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.sqrt(1 + x * x))


@softsign.defjvp
def softsign_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = jnp.sqrt(1 + x * x)
    return softsign(x), dx / (root * (1 + root))


def solved(z, gain):
    """The u with u + sin(gain u) / 2 = z, found by a loop that ends when it has found it."""

    def solve(f, u):
        going = lambda u: jnp.max(jnp.abs(f(u))) > 1e-15  # noqa: E731
        newton = lambda u: u - f(u) / (1 + 0.5 * gain * jnp.cos(gain * u))  # noqa: E731
        return lax.while_loop(
            lambda kx: (kx[0] < 50) & going(kx[1]), lambda kx: (kx[0] + 1, newton(kx[1])), (0, u)
        )[1]

    residual = lambda u: u + 0.5 * jnp.sin(gain * u) - z  # noqa: E731
    return lax.custom_root(residual, z, solve, lambda g, y: y / g(jnp.ones_like(y)))


def recurrent(z, gain):
    body = jax.checkpoint(lambda carry, x: (jnp.tanh(gain * carry + x * z), jnp.sin(carry)))
    last, outputs = lax.scan(body, jnp.zeros_like(z), jnp.array([0.5, 1.0, -0.3]))
    return last + jnp.sum(outputs, axis=0)


SAVED = jax.checkpoint_policies.dots_saveable
FUNCTIONS = {
    "custom_vjp": lambda z, gain: log1pexp(3 * gain * z),
    "custom_vjp-with-residuals": scaled_tanh,
    "custom_vjp-with-nondiff_argnums": lambda z, gain: through(jnp.sin, gain * z, 3),
    "custom_jvp": lambda z, gain: softsign(gain * z),
    "checkpoint-with-a-policy": jax.checkpoint(lambda z, a: jnp.tanh(a * jnp.outer(z, z) @ z), policy=SAVED),
    "scan-of-checkpoint": recurrent,
    "cond": lambda z, gain: lax.cond(jnp.sum(z) > gain, jnp.sin, jnp.tanh, gain * z),
    "fori_loop": lambda z, gain: lax.fori_loop(0, 3, lambda i, y: jnp.sin(gain * y) + z / (i + 1), z),
    "while_loop-in-custom_root": solved,
    "vmap": lambda z, gain: jax.vmap(lambda x: x * jnp.cos(gain * x))(z),
    "jit": jax.jit(lambda z, gain: jnp.tanh(gain * z) * gain),
}


@cache
def regression(name):
    params, hparams, batch, val = asarrays(PARAMS, HPARAMS, BATCH, VAL)
    return Reality(fit(FUNCTIONS[name]), params, hparams, lambda t: batch, val)
