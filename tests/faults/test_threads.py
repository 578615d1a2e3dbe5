"""Estimates in several threads."""

import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

from numpy.testing import assert_array_equal
from support.faults import CHEAP, ESTIMATORS, estimate, strengths
from support.frameworks import affordable


class TestThreads:
    def test_are_independent(self, backend):
        many = affordable(backend, (ESTIMATORS, range(10)), (CHEAP, range(2)))
        cases = list(itertools.product(*many))
        shifted = lambda k: {"x": strengths()["x"] + 0.1 * k}  # noqa: E731
        one = lambda case: estimate(backend, case[0], hparams=shifted(case[1])).hypergradient["x"]  # noqa: E731
        one(cases[0])  # what a framework imports when it is first used may add filters of its own
        filters = list(warnings.filters)
        serial = [one(case) for case in cases]
        with ThreadPoolExecutor(8) as pool:
            assert_array_equal(list(pool.map(one, cases)), serial)
        assert list(warnings.filters) == filters
