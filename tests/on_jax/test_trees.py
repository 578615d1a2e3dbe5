"""Trees with nodes of their own."""

from dataclasses import dataclass, field
from functools import cache, partial

import pytest
from support.jax_faults import caught
from support.reality import BATCH, EACH, ESTIMATORS, HPARAMS, PARAMS, VAL, Reality, asarrays, compiled

import hypergrad as hg
from hypergrad import errors

jax = pytest.importorskip("jax")
jnp, tree = jax.numpy, jax.tree_util
parametrize = pytest.mark.parametrize


@tree.register_pytree_node_class
class Layer:
    """A node with a setting that is no array."""

    def __init__(self, w, b, power=1):
        self.w, self.b, self.power = w, b, power

    def tree_flatten(self):
        return (self.w, self.b), self.power

    @classmethod
    def tree_unflatten(cls, power, children):
        return cls(*children, power)


@partial(tree.register_dataclass, data_fields=["w", "b"], meta_fields=["power"])
@dataclass
class Weights:
    w: object
    b: object
    power: int = field(default=1)


class TestTrees:
    @staticmethod
    @cache
    def reality(node, other):
        def outer(params, hparams, batch):
            found = jnp.tanh(hparams.b * (batch["x"] @ params.w + params.b)) ** params.power
            return jnp.mean((found - batch["y"]) ** 2)

        def inner(params, hparams, batch):
            strength = hparams.power * jnp.exp(hparams.w)
            return outer(params, hparams, batch) + strength * jnp.sum(params.w**2) + params.b**2

        (w, b, log_l2, gain), batch, val = asarrays((PARAMS["w"], 0.2, *HPARAMS.values()), BATCH, VAL)
        params, hparams = node(w, b, power=3), other(log_l2, gain, power=2)
        return Reality(hg.Bilevel(inner, outer), params, hparams, lambda t: batch, val)

    PLACES = [(Layer, Weights, name) for name in ESTIMATORS] + [(Weights, Layer, "states")]

    @parametrize("node, other, name", PLACES)
    def test_custom_nodes_and_dataclasses_hold_parameters_and_hyperparameters(self, node, other, name):
        out = self.reality(node, other).agrees(name)
        assert (type(out.state.params), out.state.params.power) == (node, 3)
        assert (type(out.hypergradient), out.hypergradient.power) == (other, 2)

    def test_an_error_names_the_field_of_a_dataclass(self):
        problem = hg.Bilevel(lambda p, h, x: jnp.sum(h.w * p.w**2) + p.b**2, lambda p, h, x: jnp.sum(p.w**2))
        (given,) = asarrays(Weights(PARAMS["w"], 0.2))
        error = caught(compiled(EACH["greedy"], problem).lower, given, given, None, None)
        assert (type(error), error.path) == (errors.DisconnectedError, "hparams.b")
