"""Leaves of the wrong kind, shapes and structures."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from support.faults import (
    HEAVY,
    RIDGE,
    SGD,
    batches,
    converted,
    each_loss,
    each_tree,
    estimate,
    every_estimator,
    every_rule,
    fit,
    losses,
    refused,
    ridge,
    says,
    strengths,
    weights,
)
from support.frameworks import beside_numpy

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


class TestKindsOfLeaves:
    @every_estimator
    @each_tree
    @parametrize("dtype", ["int64", "uint8", "bool", "complex128"])
    def test_integer_boolean_and_complex_ones_are_refused(self, backend, estimator, tree, leaf, dtype):
        given = {tree: {leaf: weights()["w"], "layers": [{"w": np.ones(2, dtype)}]}}
        real = (errors.LeafTypeError, TypeError)
        kind = (errors.UnsupportedLeafError, NotImplementedError) if dtype == "complex128" else real
        error = refused(*kind, estimate, backend, estimator, **given)
        says(error, f"{tree}['layers'][0]['w']", dtype, "relax" if kind == real else "complex")

    @beside_numpy
    @each_tree
    def test_arrays_of_two_frameworks_are_refused(self, backend, tree, leaf):
        given = converted(backend, {"params": weights(), "hparams": strengths()})
        mixed = given | {tree: given[tree] | {"other": np.ones(2)}}
        error = refused(errors.LeafTypeError, TypeError, hg.Greedy(SGD).init, RIDGE, **mixed)
        says(error, "numpy", backend.name)

    @every_estimator
    @parametrize("tree", ["params", "hparams"])
    @parametrize("empty", [{}, (), {"a": None}], ids=repr)
    def test_an_empty_tree_is_refused(self, backend, estimator, tree, empty):
        one = lambda p, h, b: backend.asarray(1.0)  # noqa: E731
        call = (estimate, backend, estimator, hg.Bilevel(one, one))
        says(refused(errors.ArgumentError, ValueError, *call, **{tree: empty}), tree)

    @every_estimator
    def test_zero_size_leaves_work_and_none_is_no_leaf(self, backend, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + p["void"].sum() ** 2 * h["void"].sum()  # noqa: E731
        params = weights() | {"void": np.zeros((0, 3)), "none": None}
        hparams = strengths() | {"void": np.zeros(0), "none": None}
        problem = hg.Bilevel(inner, fit)
        found, state, *_ = estimate(backend, estimator, problem, params=params, hparams=hparams)
        assert (found["none"], state.params["none"]) == (None, None)
        assert (found["void"].shape, state.params["void"].shape) == ((0,), (0, 3))
        assert_allclose(found["x"], estimate(backend, estimator).hypergradient["x"], rtol=1e-12)

    @every_estimator
    def test_0d_leaves_work(self, backend, estimator):
        inner = lambda p, h, b: ((p - 1.0) ** 2 + h * p**2).sum()  # noqa: E731
        problem = hg.Bilevel(inner, lambda p, h, b: ((p + 1.0) ** 2).sum())
        trees = [{"params": np.full(s, 0.4), "hparams": np.full(s, 0.5)} for s in [(), (1,)]]
        found, expected = (estimate(backend, estimator, problem, **tree).hypergradient for tree in trees)
        assert found.shape == () and found != 0.0
        assert_allclose(found, expected[0], rtol=1e-12)


class TestShapesAndStructures:
    CHANGES = {
        "shape": (lambda new, m: ({"w": new["w"][:1]}, m), ["params['w']", "(2,)", "(1,)"]),
        "key": (lambda new, m: ({"v": new["w"]}, m), ["params", "'w'", "'v'"]),
        "opt_state": (lambda new, m: (new, m[:1]), ["opt_state", "(2,)", "(1,)"]),
    }

    @every_estimator
    @each_loss
    @parametrize("shape", [None, (1,), (2,), (2, 3)])
    def test_a_loss_is_a_scalar(self, backend, estimator, where, data, shape):
        ones = None if shape is None else backend.asarray(np.ones(shape))
        vector = lambda p, h, b: None if shape is None else ridge(p, h, b) * ones  # noqa: E731
        built_in = ValueError if shape else (ValueError, TypeError)
        call = (estimate, backend, estimator, losses(where, vector))
        says(refused(hg.HypergradError, built_in, *call), where, *([str(shape), "()"] if shape else []))

    @every_rule
    @parametrize("change, parts", CHANGES.values(), ids=CHANGES)
    def test_an_update_keeps_them(self, backend, train_by, change, parts):
        step = lambda g, m, p, h: change({"w": p["w"] - 0.1 * g["w"]}, m)  # noqa: E731
        call = (estimate, backend, train_by((lambda p: backend.asarray(np.zeros(2)), step)))
        says(refused(errors.ArgumentError, ValueError, *call), *parts)

    @every_rule
    def test_a_learning_rate_is_a_number(self, backend, train_by):
        square, rule = lambda p, h, b: p["w"] ** 2, hg.SGD(lambda h: h["lr"])
        trees = {"params": {"w": np.array(0.5)}, "hparams": {"lr": np.full(3, 0.1)}}
        call = (estimate, backend, train_by(rule), hg.Bilevel(square, square))
        says(refused(errors.ArgumentError, ValueError, *call, **trees), "(3,)", "()")

    def test_a_state_of_other_parameters(self, backend):
        estimator = hg.Greedy(HEAVY)
        params, other, hparams, train = converted(
            backend, (weights(), {"w": np.zeros(3)}, strengths(), batches())
        )
        state = estimator.init(RIDGE, other, hparams)._replace(params=params)
        call = (estimator.estimate, RIDGE, state, hparams, train, train[0])
        says(refused(errors.ArgumentError, ValueError, *call), "(2,)", "(3,)")
