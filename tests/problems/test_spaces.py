"""Spaces of hyperparameters."""

from functools import partial

import numpy as np
import optree
import pytest
from hypothesis import strategies as st
from support.frameworks import each_backend
from support.random_problems import SGD, agree, flat, hundred, problems

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.errors import ArgumentError
from hypergrad.tuning import spaces


class TestSpaces:
    INSIDE = {
        hg.Real(): [-2.0, 0.0, 3.0],
        hg.Positive(): [1e-8, 1.0, 50.0],
        hg.Positive("softplus"): [1e-8, 1.0, 50.0],
        hg.NonNegative(): [0.0, 1.0, 2.0],
        hg.Interval(-1.0, 3.0): [-0.99, 0.0, 2.9],
        hg.Simplex(): [0.2, 0.3, 0.5],
    }
    OUTSIDE = {
        hg.Real(): [np.nan, 0.0],
        hg.Positive(): [0.0, 1.0],
        hg.Positive("softplus"): [-1.0, 1.0],
        hg.NonNegative(): [-1e-9, 1.0],
        hg.Interval(0.0, 1.0): [0.0, 0.5],
        hg.Simplex(): [0.5, 0.6],
    }

    @pytest.mark.parametrize("space", INSIDE, ids=repr)
    def test_the_way_there_and_back(self, space, backend):
        values = np.array(self.INSIDE[space])
        free = spaces.unconstrain(backend, space, backend.asarray(values))
        np.testing.assert_allclose(
            backend.to_numpy(spaces.constrain(backend, space, free)), values, rtol=1e-12
        )

    @pytest.mark.parametrize("space", OUTSIDE, ids=repr)
    def test_one_starts_inside(self, space):
        with pytest.raises(ArgumentError, match=r"hparams\['a'\] lies outside"):
            spaces.unconstrain(get_backend("numpy"), {"a": space}, {"a": np.array(self.OUTSIDE[space])})

    @pytest.mark.parametrize(
        "space", [hg.Positive(), hg.Positive("softplus"), hg.Interval(0.0, 2.0), hg.Simplex()]
    )
    def test_no_coordinate_leads_out(self, space):
        with np.errstate(over="ignore"):
            values = space.constrain(get_backend("numpy").xp, np.array([-700.0, 0.0, 700.0]))
        assert np.all(np.isfinite(values)) and np.all(values >= 0)

    # By softplus a million is a million; only the other end has to be moved.
    @pytest.mark.parametrize("space, count", [(hg.Positive(), 2), (hg.Positive("softplus"), 1)], ids=repr)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_a_huge_step_leaves_a_positive_number(self, space, count, dtype, backend):
        far = backend.asarray(np.array([-1e6, 1.0, 1e6], dtype))
        free, moved = spaces.project(backend, space, far)
        values = backend.to_numpy(spaces.constrain(backend, space, free))
        assert int(moved) == count and values.dtype == dtype
        assert np.all(values > 0) and np.all(np.isfinite(values))

    def test_projection_counts_what_it_moves(self):
        moved, count = spaces.project(get_backend("numpy"), hg.NonNegative(), np.array([-1.0, 2.0, -3.0]))
        assert moved.tolist() == [0.0, 2.0, 0.0] and count == 2

    @pytest.mark.parametrize("space", [{"b": hg.Real()}, {"a": "positive"}, [hg.Real()]])
    def test_a_tree_of_spaces_fits_the_hyperparameters(self, space):
        with pytest.raises(ArgumentError, match="space"):
            spaces.spread(get_backend("numpy"), space, {"a": np.ones(2)})

    def test_a_tree_of_spaces_stops_at_any_level(self):
        spread = spaces.spread(get_backend("numpy"), {"a": hg.Positive()}, {"a": [np.ones(2), np.ones(3)]})
        assert spread == {"a": [hg.Positive(), hg.Positive()]}


KINDS = hg.Real(), hg.Positive(), hg.Positive("softplus"), hg.NonNegative(), hg.Interval(-1, 2), hg.Simplex()


@each_backend
class TestChainRule:  # dC2/du = (∂λ/∂u)ᵀ dC2/dλ
    @hundred(problems(), st.data())
    def test_chain_rule(self, backend, p, data):
        def kind(leaf):  # a simplex needs an axis to sum over
            found = data.draw(st.sampled_from(KINDS))
            return hg.Real() if found == hg.Simplex() and 0 in (leaf.ndim, leaf.size) else found

        space = optree.tree_map(kind, p.hparams)
        problem, params, drawn, train, val = p.on(backend)
        free = backend.map(lambda s, u: abs(u) if s == hg.NonNegative() else u, space, drawn)
        constrain = partial(spaces.constrain, backend, space)
        hparams = constrain(free)
        there_and_back = constrain(spaces.unconstrain(backend, space, hparams))
        agree(flat(there_and_back, backend), flat(hparams, backend), 1e-12)

        composed = hg.Bilevel(
            lambda theta, u, b: problem.inner(theta, constrain(u), b),
            lambda theta, u, b: problem.outer(theta, constrain(u), b),
        )
        greedy = hg.Greedy(SGD)
        of_hparams = hg.hypergradient(problem, params, hparams, train[0], val, greedy)
        chained = spaces.chain(backend, space, free, of_hparams)
        at = (composed, params, free, train[0], val, greedy)
        agree(flat(chained, backend), flat(hg.hypergradient(*at), backend), 1e-12)
        check = hg.check_hypergradient(*at, directions=1)
        agree(check.estimate, check.differences, 1e-6)
