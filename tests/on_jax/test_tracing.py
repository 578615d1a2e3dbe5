"""What is raised while tracing: what shapes, dtypes and the graph show."""

from functools import partial

import numpy as np
import pytest
from support.jax_faults import GIVEN, RIDGE, caught, judged, ridge, same_error
from support.reality import EACH, RULE, asarrays, compiled, eager

import hypergrad as hg
from hypergrad import errors

jax = pytest.importorskip("jax")
jnp, lax, tree = jax.numpy, jax.lax, jax.tree_util
parametrize = pytest.mark.parametrize
SINGLE = tree.tree_map(np.float32, GIVEN)
TRACED = {
    "integer-params": ({"params": {"w": np.ones(2, int)}}, RIDGE, errors.LeafTypeError),
    "integer-hparams": ({"hparams": {"x": np.ones(2, int)}}, RIDGE, errors.LeafTypeError),
    "boolean-hparams": ({"hparams": {"x": np.ones(2, bool)}}, RIDGE, errors.LeafTypeError),
    "complex-hparams": ({"hparams": {"x": np.ones(2, complex)}}, RIDGE, errors.UnsupportedLeafError),
    "wider-hparams": (SINGLE | {"hparams": GIVEN["hparams"]}, RIDGE, errors.LeafTypeError),
    "a-wider-T1": (SINGLE | {"train": GIVEN["train"]}, RIDGE, errors.LeafTypeError),
    "a-wider-T2": (SINGLE | {"val": GIVEN["val"]}, RIDGE, errors.LeafTypeError),
    "empty-params": ({"params": {}}, RIDGE, errors.ArgumentError),
    "empty-hparams": ({"hparams": {}}, RIDGE, errors.ArgumentError),
    "no-scalar-in-T1": ({}, hg.Bilevel(lambda p, h, b: h["x"] * p["w"], judged), errors.ArgumentError),
    "no-scalar-in-T2": ({}, hg.Bilevel(ridge, lambda p, h, b: p["w"]), errors.ArgumentError),
    "no-array-in-T1": ({}, hg.Bilevel(lambda p, h, b: None, judged), errors.ArgumentError),
    "an-integer-in-T2": (
        {},
        hg.Bilevel(ridge, lambda p, h, b: p["w"].size * jnp.int32(1)),
        errors.ArgumentError,
    ),
    "an-unused-hyperparameter": (
        {"hparams": {"x": np.ones(2), "idle": np.ones(3)}},
        RIDGE,
        errors.DisconnectedError,
    ),
    "a-stopped-hyperparameter": (
        {},
        hg.Bilevel(lambda p, h, b: ridge(p, lax.stop_gradient(h), b), judged),
        errors.DisconnectedError,
    ),
    "stopped-parameters-in-T1": (
        {},
        hg.Bilevel(lambda p, h, b: ridge(lax.stop_gradient(p), h, b), judged),
        errors.DisconnectedError,
    ),
    "stopped-parameters-in-T2": (
        {},
        hg.Bilevel(ridge, lambda p, h, b: judged(lax.stop_gradient(p), h, b)),
        errors.DisconnectedError,
    ),
    "no-batches": ({"train": []}, RIDGE, errors.ArgumentError),
}
OF_UPDATES = {
    "a-shape": ((lambda p: (), lambda g, s, p, h: ({"w": p["w"][:1]}, s)), {}, errors.ArgumentError),
    "a-key": ((lambda p: (), lambda g, s, p, h: ({"v": p["w"]}, s)), {}, errors.ArgumentError),
    "its-state": ((lambda p: p, lambda g, s, p, h: (p, {"w": s["w"][:1]})), {}, errors.ArgumentError),
    "a-dtype": (
        (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - np.full(2, 0.1) * g["w"]}, s)),
        SINGLE,
        errors.LeafTypeError,
    ),
    "by-too-few-rates": (hg.SGD(lambda h: h["x"][:1]), {}, errors.ArgumentError),
}


class TestRaisedWhileTracing:
    """Without a value: `lower` runs nothing."""

    @staticmethod
    def agree(estimator, problem, given, kind):
        args = asarrays(*(GIVEN | given).values())
        error = caught(eager(estimator, problem), *args)
        assert type(error) is kind
        traced = caught(compiled(estimator, problem).lower, *args)
        same_error(traced, error)
        assert str(traced) == str(error)

    @parametrize("name, case", [(n, case) for case in TRACED for n in EACH if n in ("greedy", "implicit")])
    def test_what_shapes_dtypes_and_the_graph_show(self, name, case):
        given, problem, kind = TRACED[case]
        self.agree(EACH[name], problem, given, kind)

    @parametrize("case", ["integer-hparams", "a-wider-T1", "no-scalar-in-T1", "an-unused-hyperparameter"])
    def test_what_is_seen_inside_of_a_loop(self, case):
        given, problem, kind = TRACED[case]
        self.agree(EACH["states"], problem, given, kind)

    @parametrize("train_by", [hg.Greedy, partial(hg.Unrolled, steps=3)], ids=["greedy", "unrolled"])
    @parametrize("rule, given, kind", OF_UPDATES.values(), ids=OF_UPDATES)
    def test_updates_that_change(self, train_by, rule, given, kind):
        self.agree(train_by(rule), RIDGE, given, kind)

    @parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_fewer_batches_than_steps(self, tape):
        self.agree(hg.Unrolled(RULE, 5, tape=tape), RIDGE, {}, errors.ArgumentError)

    @parametrize("name", ["greedy", "full", "states"])
    def test_a_state_of_other_parameters(self, name):
        params, hparams, (train, *_), val = asarrays(*GIVEN.values())
        state = EACH[name].init(RIDGE, {"w": jnp.zeros(3)}, hparams)._replace(params=params)
        run = lambda *args: EACH[name].estimate(RIDGE, *args)  # noqa: E731
        args = state, hparams, lambda t: train, val
        error = caught(run, *args)
        assert "(2,)" in str(error) and "(3,)" in str(error)
        same_error(caught(jax.jit(run, static_argnums=2).lower, *args), error)

    def test_a_hessian_too_large_to_be_formed(self):
        self.agree(hg.Implicit(hg.Direct(max_unknowns=1)), RIDGE, {}, errors.ArgumentError)
