"""Functions inside the losses are differentiated as training shows, or refused."""

from functools import cache, partial

import numpy as np
import pytest
from numpy.testing import assert_allclose
from support.jax_faults import caught
from support.jax_functions import FUNCTIONS, log1pexp, regression
from support.reality import (
    BATCH,
    EACH,
    HPARAMS,
    PARAMS,
    RULE,
    VAL,
    Reality,
    asarrays,
    compiled,
    each_estimator,
    fit,
    penalty,
)

import hypergrad as hg
from hypergrad import errors

jax = pytest.importorskip("jax")
jnp, lax = jax.numpy, jax.lax
parametrize, ANYWHERE = pytest.mark.parametrize, float("inf")


@parametrize("function", FUNCTIONS)
@each_estimator
def test_a_function_inside_the_losses_is_differentiated_as_training_shows(function, name):
    regression(function).agrees(name)


class TestCustomRules:
    def test_a_safe_one_is_finite_where_its_definition_overflows(self):
        args = asarrays(PARAMS, HPARAMS, BATCH, VAL)
        safe, plain = (
            compiled(EACH["greedy"], fit(lambda z, gain, f=f: f(1e4 * gain * z) / 1e4))(*args)
            for f in (log1pexp, lambda x: jnp.log(1 + jnp.exp(x)))
        )
        assert np.isfinite(EACH["greedy"].check(safe).hypergradient["gain"])
        assert type(caught(EACH["greedy"].check, plain)) is errors.NonFiniteError

    @staticmethod
    @cache
    def reality():
        @jax.custom_vjp
        def stairs(x):
            return jnp.round(4 * x) / 4

        stairs.defvjp(lambda x: (stairs(x), x), lambda x, g: (g * (1 + 0.3 * jnp.sin(x)),))

        def inner(params, hparams, batch):
            # Linear in the stairs: training sees their rule, and nowhere where they really are.
            found = hparams["gain"] * stairs(batch["x"] @ params["w"])
            return jnp.mean(batch["y"] * found) + penalty(params, hparams)

        params, hparams, batch, val = asarrays(PARAMS, HPARAMS, BATCH, VAL)
        problem = hg.Bilevel(inner, fit(lambda z, gain: jnp.tanh(z)).outer)
        return Reality(problem, params, hparams, lambda t: batch, val)

    @parametrize("name", ["greedy", "full", "states"])
    def test_one_that_is_no_derivative_is_followed_as_training_follows_it(self, name):
        self.reality().agrees(name)


def callback(z, gain):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(z.shape, z.dtype), gain * z)


@jax.custom_vjp
def once(x):
    """Its rule calls back, so that it has a first derivative and no second one."""
    return jnp.tanh(x)


def once_backward(x, g):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (jax.pure_callback(lambda x, g: g / np.cosh(x) ** 2, shape, x, g),)


once.defvjp(lambda x: (once(x), x), once_backward)


def until_small(z, gain):
    return lax.while_loop(lambda y: jnp.sum(y**2) > 0.1, lambda y: 0.5 * gain * y, z)


def as_often_as(z, gain):
    return lax.fori_loop(0, jnp.int32(jnp.sum(z**2)), lambda i, y: jnp.sin(gain * y), z)


WITHOUT = {
    "while_loop": (until_small, "while_loop"),
    "fori_loop-with-a-traced-bound": (as_often_as, "while_loop|fori_loop"),
    "pure_callback": (callback, "callback"),
    "custom_vjp-that-calls-back": (lambda z, gain: once(gain * z), "callback"),
}


def jax_fails_by_itself(f):
    """Does a derivative in a derivative end in a TypeError of JAX, as for while loops up to JAX 0.9?"""
    try:
        jax.eval_shape(lambda z, gain: jax.vjp(lambda z: jax.vjp(f, z, gain)[0], z)[0], jnp.ones(3), 0.5)
    except TypeError as error:
        return "NoneType" in str(error)
    except Exception:
        return False
    return False


class TestWithoutDerivative:
    @each_estimator
    @parametrize("f, operation", WITHOUT.values(), ids=WITHOUT)
    def test_is_refused_by_name(self, name, f, operation):
        params, hparams, batch, val = asarrays(PARAMS, HPARAMS, BATCH, VAL)
        refusals, says = (errors.UnsupportedOpError,), operation
        if jax_fails_by_itself(f):
            refusals, says = (*refusals, TypeError), f"{operation}|NoneType"
        with pytest.raises(refusals, match=says):
            compiled(EACH[name], fit(f)).lower(params, hparams, batch, val)

    @parametrize(
        "take",
        [
            partial(hg.Greedy, RULE),
            partial(hg.Implicit, hg.CG(rtol=1e-4), checks=hg.Checks(tolerance=ANYWHERE)),
        ],
    )
    def test_without_a_second_one_differences_serve(self, take):
        args, (f, _) = asarrays(PARAMS, HPARAMS, BATCH, VAL), WITHOUT["custom_vjp-that-calls-back"]
        exact, mixed = take(), take(products=hg.FiniteDifference())
        found = mixed.check(compiled(mixed, fit(f))(*args)).hypergradient
        expected = compiled(exact, fit(lambda z, gain: jnp.tanh(gain * z)))(*args).hypergradient
        assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-3)
