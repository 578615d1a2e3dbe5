"""Errors in JAX, raised at once or carried in the report."""

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import errors
from support.reality import BATCH, PARAMS, VAL, asarrays

jax = pytest.importorskip("jax")
jnp = jax.numpy


def caught(call, *args):
    with pytest.raises(errors.HypergradError) as found:
        call(*args)
    return found.value


def same_error(mine, other):
    """Errors of one class with the same attributes."""

    def attributes(error):
        return {name: value for name, value in vars(error).items() if name != "__notes__"}  # which JAX adds

    close = {
        k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in attributes(other).items()
    }
    assert type(mine) is type(other) and attributes(mine) == close


def ridge(params, hparams, batch):
    return judged(params, hparams, batch) + jnp.sum(hparams["x"] ** 2 * params["w"] ** 2)


def judged(params, hparams, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


RIDGE = hg.Bilevel(ridge, judged)
GIVEN = {
    "params": {"w": PARAMS["w"]},
    "hparams": {"x": np.array([-1.0, 0.5])},
    "train": [BATCH] * 4,
    "val": VAL,
}


def quadratic(params, hparams, batch):
    """A Hessian that is a hyperparameter, where the gradient is zero."""
    w = params["w"]
    return 0.5 * w @ (hparams["hessian"] @ w) + hparams["x"] * jnp.sum(w)


QUADRATIC = hg.Bilevel(quadratic, lambda p, h, b: jnp.sum(p["w"]))


def quadratic_args(hessian, slope=0.0):
    return asarrays({"w": np.zeros(len(hessian))}, {"x": slope, "hessian": hessian}, None, None)
