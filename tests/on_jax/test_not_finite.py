"""Numbers that are not finite are carried in the report."""

from functools import cache

import numpy as np
import pytest
from support.jax_faults import caught, judged, ridge, same_error
from support.reality import EACH, VAL, asarrays, compiled, eager, program

import hypergrad as hg

jax = pytest.importorskip("jax")
jnp = jax.numpy
parametrize, ANYWHERE = pytest.mark.parametrize, float("inf")


def rooted(loss):
    """Add √ of a parameter and of a hyperparameter, shifted away from zero or switched off by the batch."""

    def with_roots(params, hparams, batch):
        on, shift = batch["on"], batch["shift"]
        of_params = on[0] * jnp.sqrt(params["w"][0] + shift[0])
        of_hparams = on[1] * params["w"][1] * jnp.sqrt(hparams["x"][0] + shift[1])
        return loss(params, hparams, batch) + of_params + of_hparams

    return with_roots


ROOTED = hg.Bilevel(rooted(ridge), rooted(judged))
ZERO = {"params": {"w": np.array([0.0, 0.5])}, "hparams": {"x": np.array([0.0, 0.5])}}
OFF = {"on": np.zeros(2), "shift": np.ones(2)}
STILL = {"x": np.zeros((6, 2)), "y": np.zeros(6)} | OFF  # leaves a zero where it is
W, X = "params['w']", "hparams['x']"
AT_ZERO = {
    W: {"on": np.array([1.0, 0.0]), "shift": np.array([0.0, 1.0])},
    X: {"on": np.array([0.0, 1.0]), "shift": np.array([1.0, 0.0])},
}
NAN = {"y": np.full(6, np.nan)}
INNER = EACH | {"implicit": hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=ANYWHERE))}


@cache
def program_with_roots(name):
    return compiled(INNER[name], ROOTED)


class TestNotFinite:
    """Carried in the report and raised by `check`, as eager estimates raise it."""

    @staticmethod
    def agree(name, **given):
        params, hparams, train, val = asarrays(
            *(ZERO | {"train": [STILL] * 4, "val": VAL | OFF} | given).values()
        )
        error = caught(eager(INNER[name], ROOTED), params, hparams, train, val)
        out = program_with_roots(name)(params, hparams, train, val)
        same_error(caught(INNER[name].check, out), error)
        return error

    @parametrize("name", INNER)
    def test_a_loss_on_t1(self, name):
        bad = 0 if name in ("greedy", "implicit") else 2
        train = [STILL | (NAN if t == bad else {}) for t in range(4)]
        error = self.agree(name, train=train)
        assert (error.where, error.step, error.path) == ("T1", bad, None)

    @parametrize("name", ["greedy", "states", "implicit"])
    def test_a_loss_on_t2(self, name):
        error = self.agree(name, val=VAL | OFF | NAN)
        steps = INNER[name].training_steps
        assert (error.where, error.step, error.path) == ("T2", steps, None)

    @parametrize("name, path", [*(("greedy", path) for path in AT_ZERO), ("states", X), ("implicit", W)])
    def test_a_root_at_zero_on_t1(self, name, path):
        error = self.agree(name, train=[STILL | AT_ZERO[path]] * 4)
        assert (error.where, error.path) == ("T1", path)

    @parametrize("name, path", [*(("greedy", path) for path in AT_ZERO), ("states", W), ("implicit", X)])
    def test_a_root_at_zero_on_t2(self, name, path):
        error = self.agree(name, val=VAL | AT_ZERO[path])
        assert (error.where, error.path) == ("T2", path)

    @parametrize("name", ["greedy", "states"])
    def test_the_step_is_counted_from_the_beginning_of_training(self, name):
        params, hparams, train, val = asarrays(*(ZERO | {"train": STILL | NAN, "val": VAL | OFF}).values())
        estimator = INNER[name]
        state = estimator.init(ROOTED, params, hparams)._replace(step=5)
        run = program(lambda s, h, t, v: estimator.estimate(ROOTED, s, h, lambda _: t, v))
        assert caught(estimator.check, run(state, hparams, train, val)).step == 5


class Mending(hg.UpdateRule):
    """A rule of one's own, in which a gradient that is not finite leaves no trace."""

    def init(self, backend, params):
        return ()

    def update(self, backend, gradient, opt_state, params, hparams, step):
        whole = backend.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        return backend.map(lambda p, g: p - 0.1 * g, params, whole), opt_state


def test_a_gradient_that_an_update_hides_is_found_in_a_program():
    """0/0 in the gradient alone: the loss and all parameters after it are finite."""
    problem = hg.Bilevel(
        lambda p, h, b: h * (p["a"] ** 2).sum() + jnp.where(p["b"] > 0, jnp.sqrt(p["b"]), 0.0).sum(),
        lambda p, h, b: (p["a"] ** 2).sum(),
    )
    estimator = hg.Greedy(Mending())
    params, lam = {"a": jnp.ones(2), "b": jnp.zeros(2)}, jnp.asarray(0.3)
    out = jax.jit(lambda state, lam: estimator.estimate(problem, state, lam, None, None, backend="jax"))(
        estimator.init(problem, params, lam, backend="jax"), lam
    )
    with pytest.raises(hg.errors.NonFiniteError, match=r"params\['b'\]"):
        estimator.check(out)
