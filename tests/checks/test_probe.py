"""`probe`, which compares the ways to the mixed term."""

from functools import partial

import numpy as np
import pytest
import torch
from support.mixed import GREEDY, IMPLICIT, drawn, flat, net, on_both
from support.once_differentiable import FUNCTIONS, by_tanh, torch_task

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


class TestProbe:
    WAYS = (hg.Exact(), hg.FiniteDifference(), hg.FiniteDifference(sides=1))

    def probe(self, task, estimator, **options):
        options = {"repeats": 2} | options
        return hg.probe(task.problem, task.params, task.hparams, task.train, task.val, estimator, **options)

    @on_both
    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["cg"]], ids=["Greedy", "Implicit"])
    def test_a_row_for_each_way(self, backend, make):
        seen = self.probe(net(backend), make())
        assert tuple(way.products for way in seen.ways) == self.WAYS
        assert not any(way.failure for way in seen.ways) and all(way.seconds > 0 for way in seen.ways)
        exact, two, one = (way.error for way in seen.ways)
        assert exact == 0.0 < two <= 1e-7 and 0.0 < one <= 1e-4
        title, *rows = str(seen).splitlines()
        assert type(make()).__name__ in title and len(rows) == 3
        for row, name in zip(rows, ("Exact()", repr(self.WAYS[1]), repr(self.WAYS[2])), strict=True):
            assert row.strip().startswith(name) and " ms " in row

    @on_both
    def test_the_best_is_the_fastest(self, backend):
        seen = self.probe(net(backend), hg.Greedy(hg.SGD(0.1)))
        assert seen.best == min(seen.ways, key=lambda way: way.seconds).products

    @on_both
    def test_ways_of_ones_own(self, backend):
        ways = tuple(hg.FiniteDifference(radius=radius) for radius in (1e-6, 1e-4))
        seen = self.probe(net(backend), hg.Greedy(hg.SGD(0.1)), ways=ways)
        assert tuple(way.products for way in seen.ways) == ways
        # Without an exact way it is the difference's own estimate.
        assert all(0 < way.error <= 1e-5 for way in seen.ways)

    @on_both
    def test_random_losses_are_compared_on_the_same_draws(self, backend):
        with backend.random.replay(backend.random.state(3)):
            task = net(backend, noise=drawn)
            found = drawn(task.train)
        with backend.random.replay(backend.random.state(3)):
            seen = self.probe(net(backend, noise=drawn), hg.Greedy(hg.SGD(0.1)))
            np.testing.assert_array_equal(flat(drawn(task.train)), flat(found))
        assert all(way.error <= 1e-4 for way in seen.ways)

    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["cg"]], ids=["Greedy", "Implicit"])
    def test_a_way_that_fails_says_why(self, make):
        task = torch_task(FUNCTIONS["once-differentiable"]()[0])
        seen = self.probe(task, make())
        exact, *differences = seen.ways
        assert "OnceTanh" in exact.failure and np.isnan([exact.seconds, exact.error]).all()
        assert not any(way.failure for way in differences) and seen.best in self.WAYS[1:]
        assert "OnceTanh" in str(seen).splitlines()[1] and " ms " not in str(seen).splitlines()[1]
        out = task.estimate(make(products=seen.best))
        assert np.isfinite(flat(out.hypergradient)).all()

    def test_no_way_that_works(self):
        task = torch_task(FUNCTIONS["once-differentiable"]()[0])
        seen = self.probe(task, hg.Greedy(hg.SGD(0.1)), ways=(hg.Exact(),))
        with pytest.raises(errors.ArgumentError):
            _ = seen.best

    @on_both
    def test_a_difference_that_is_refused(self, backend):
        ways = (hg.Exact(), hg.FiniteDifference(radius=0.3, tolerance=1e-6))
        seen = self.probe(net(backend), hg.Greedy(hg.SGD(0.1)), ways=ways)
        assert "finite differences" in seen.ways[1].failure and seen.best == hg.Exact()

    def test_an_estimator_without_a_mixed_term(self):
        task = torch_task(partial(by_tanh, torch.tanh))
        with pytest.raises(errors.ArgumentError, match="Unrolled"):
            self.probe(task, hg.Unrolled(hg.SGD(0.1), 2))
