"""Precisions that are mixed, kept, or too low."""

import numpy as np
import optree
import pytest
from numpy.testing import assert_allclose
from support.faults import (
    HEAVY,
    SGD,
    batches,
    each_loss,
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


class TestDtypes:
    single = {"params": weights("f4"), "hparams": strengths("f4"), "train": batches(3, "f4")}
    single |= {"val": batches(1, "f4")}
    MIXED = {
        "hparams": (single | {"hparams": strengths()}, ["hparams['x'] has"]),
        "train": (single | {"train": batches(3)}, ["train['x']"]),
        "val": (single | {"val": batches(1)}, ["val['x']"]),
    }

    @every_estimator
    @parametrize("trees, paths", MIXED.values(), ids=MIXED)
    def test_an_operation_that_mixes_them_is_refused(self, backend, estimator, trees, paths):
        error = refused(errors.LeafTypeError, TypeError, estimate, backend, estimator, **trees)
        says(error, "float32", "float64", *paths)

    @every_estimator
    @parametrize("wide", ["w", "b", "x"])
    def test_leaves_may_have_several_and_keep_their_own(self, backend, estimator, wide):
        """A model that converts where it must: λ in one dtype, and θ in two."""
        dtypes = {name: "f8" if name == wide else "f4" for name in ("w", "b", "x")}

        def at(tree, name):
            return backend.cast(tree[name], "float32") if dtypes[name] == "f8" else tree[name]

        def squares(p, batch):
            return ((batch["x"] @ at(p, "w") + at(p, "b") - batch["y"]) ** 2).mean()

        def inner(p, h, batch):
            return squares(p, batch) + (at(h, "x") ** 2 * at(p, "w") ** 2).sum() + 0.1 * at(p, "b") ** 2

        def outer(p, h, batch):
            return squares(p, batch)

        def of(dtypes):
            params = {"w": weights(dtypes["w"])["w"], "b": np.array(0.2, dtypes["b"])}
            trees = self.single | {"params": params, "hparams": strengths(dtypes["x"])}
            return estimate(backend, estimator, hg.Bilevel(inner, outer), **trees)

        out, single = of(dtypes), of(dict.fromkeys(dtypes, "f4"))
        kept = {"w": out.state.params["w"], "b": out.state.params["b"], "x": out.hypergradient["x"]}
        assert {name: leaf.dtype.str[1:] for name, leaf in kept.items()} == dtypes
        assert_allclose(out.hypergradient["x"], single.hypergradient["x"], rtol=1e-3, atol=1e-6)

    @every_estimator
    def test_float32_stays_float32(self, backend, estimator):
        out = estimate(backend, estimator, **self.single)
        assert out.hypergradient["x"].dtype == out.state.params["w"].dtype == np.float32
        assert_allclose(out.hypergradient["x"], estimate(backend, estimator).hypergradient["x"], rtol=1e-3)

    @every_rule
    def test_an_update_that_upcasts_is_refused(self, backend, train_by):
        rates = backend.asarray(np.full(2, 0.1))
        pair = (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - g["w"] * rates}, s))
        error = refused(errors.LeafTypeError, TypeError, estimate, backend, train_by(pair), **self.single)
        says(error, "params['w']", "float32", "float64")


@beside_numpy
@parametrize("estimator", [hg.Greedy(SGD), hg.Greedy(HEAVY), hg.Unrolled(HEAVY, 3, 2, hg.States())], ids=repr)
class TestHalfPrecision:
    @staticmethod
    def given(backend, dtype):
        trees = {"params": weights(), "hparams": strengths(), "train": batches(), "val": batches()[0]}
        like = backend.xp.zeros((), dtype=getattr(backend.xp, dtype))
        return optree.tree_map(lambda x: backend.asarray(x, like=like), trees)

    def test_is_kept(self, backend, estimator):
        out = estimate(backend, estimator, **self.given(backend, "float16"))
        expected = estimate(backend, estimator).hypergradient["x"]
        assert out.hypergradient["x"].dtype == out.state.params["w"].dtype == np.float16
        assert_allclose(out.hypergradient["x"], expected, rtol=0.1)

    @each_loss
    def test_an_overflow_advises_float32(self, backend, estimator, where, data):
        sound = ridge if where == "T1" else fit
        problem = losses(where, lambda p, h, b: sound(p, h, b) * 3e4 * 3e4)
        call = (estimate, backend, estimator, problem)
        error = refused(errors.NonFiniteError, ArithmeticError, *call, **self.given(backend, "float16"))
        assert (error.where, error.path) == (where, None)
        says(error, "float32")
