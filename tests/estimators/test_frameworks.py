"""Estimates on random problems: every framework, every precision, and nothing changed."""

from functools import partial

import numpy as np
import optree
import pytest
from support.frameworks import NUMPY, beside_numpy, each_backend, on_torch
from support.random_problems import (
    ESTIMATORS,
    agree,
    batches_for,
    estimate,
    estimators,
    flat,
    hundred,
    hypergradient,
    problems,
    without_promises,
)


@beside_numpy
class TestFrameworks:  # every other one against NumPy, on the same problem
    @pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
    @hundred(p=problems())
    def test_agree(self, backend, estimator, p):
        mine, other = (estimate(b, p, estimator) for b in (backend, NUMPY))
        agree(flat(mine.hypergradient, backend), flat(other.hypergradient), 1e-10)
        agree(flat(mine.state, backend), flat(other.state), 1e-10)


def in_single(p):
    single = partial(optree.tree_map, lambda x: np.asarray(x, np.float32))
    return p._replace(**{name: single(getattr(p, name)) for name in ("params", "hparams", "train", "val")})


class TestPrecision:  # against NumPy in float64
    @each_backend
    @hundred(problems(), estimators)
    def test_float32(self, backend, p, estimator):
        out = estimate(backend, in_single(p), estimator)
        leaves = backend.flatten((out.hypergradient, out.state.params, out.state.opt_state))[0]
        assert {backend.describe(leaf).dtype for leaf in leaves} == {"float32"}
        agree(flat(out.hypergradient, backend), hypergradient(NUMPY, p, estimator), 1e-5)

    @on_torch
    @hundred(problems(), without_promises)
    def test_matrix_products_in_bfloat16(self, backend, p, estimator):
        import torch

        def rounded(cost, *at):
            with torch.autocast("cpu", torch.bfloat16):
                return cost(*at)

        single = in_single(p)
        mixed = single._replace(inner=partial(rounded, p.inner), outer=partial(rounded, p.outer))
        mine, other = (estimate(backend, q, estimator) for q in (mixed, single))
        values = [(q.inner_value, q.outer_value, q.state.params) for q in (mine, other)]
        coarse, fine = (flat(at, backend) for at in values)
        assert (coarse != fine).any()  # bfloat16 did take part
        agree(flat(mine.hypergradient, backend), hypergradient(NUMPY, p, estimator), 1e-1)


@each_backend
class TestManners:
    @hundred(problems(), estimators)
    def test_what_is_given_is_left_as_it_was(self, backend, p, estimator):
        problem, params, hparams, train, val = p.on(backend)
        batches = batches_for(estimator, backend, train)
        state = estimator.init(problem, params, hparams)

        def bits(tree):
            leaves = [backend.to_numpy(leaf).tobytes() for leaf in optree.tree_leaves(tree)]
            return backend.paths(tree, ""), leaves

        given = bits((params, hparams, train, val, state))
        first, again = (estimator.estimate(problem, state, hparams, batches, val) for _ in range(2))
        assert bits((params, hparams, train, val, state)) == given
        assert bits(first) == bits(again)
