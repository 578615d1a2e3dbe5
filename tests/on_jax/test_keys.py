"""Keys for noise."""

from functools import cache

import pytest
from support.reality import BATCH, ESTIMATORS, PARAMS, VAL, Reality, asarrays

import hypergrad as hg

jax = pytest.importorskip("jax")
jnp = jax.numpy
parametrize = pytest.mark.parametrize


class TestKeysInTheBatch:
    """The gradient and the mixed derivative see one draw: that is what real training differentiates."""

    @staticmethod
    @cache
    def reality(make, fixed):
        def outer(params, hparams, batch):
            return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)

        def inner(params, hparams, batch):
            noise = jax.random.normal(batch["key"], batch["x"].shape)
            kept = jax.random.bernoulli(jax.random.fold_in(batch["key"], 1), 0.7, batch["y"].shape)
            noisy = batch | {"x": (batch["x"] + hparams["scale"] * noise) * kept[:, None]}
            return outer(params, hparams, noisy) + jnp.sum(params["w"] ** 2)

        batch, val, key = *asarrays(BATCH, VAL), make(7)
        batches = lambda t: batch | {"key": key if fixed else jax.random.fold_in(key, t)}  # noqa: E731
        params, hparams = asarrays(PARAMS, {"scale": 0.6})
        return Reality(hg.Bilevel(inner, outer), params, hparams, batches, val)

    MAKES = [(jax.random.key, name) for name in ESTIMATORS]
    MAKES += [(jax.random.PRNGKey, name) for name in ("greedy", "states", "implicit")]

    @parametrize("make, name", MAKES)
    def test_a_key_of_the_batch_serves_every_derivative(self, make, name):
        self.reality(make, fixed=name == "implicit").agrees(name)

    @parametrize("make, name", [(jax.random.PRNGKey, "full"), (jax.random.key, "states")])
    def test_keys_in_a_list_of_batches(self, make, name):
        reality = self.reality(make, fixed=False)
        reality.agrees(name, reality.by(name, [reality.train(t) for t in range(4)]))
