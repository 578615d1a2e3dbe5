"""Every registered backend obeys the laws, and every estimator on every backend."""

import pytest

import hypergrad as hg
from hypergrad import testing
from hypergrad.backend import available

ESTIMATORS = [
    hg.Greedy(hg.SGD(0.1)),
    hg.Greedy(hg.Adam(0.1), response="gradient", lookahead=False),
    hg.Unrolled(hg.SGD(0.02, momentum=0.9, nesterov=True), 4),
    hg.Unrolled(hg.AdamW(0.02), 4, tape=hg.States()),
    hg.Unrolled(hg.RMSprop(0.02, momentum=0.5), 4, truncate=2),
    hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=float("inf"))),
    hg.Implicit(hg.Direct(), checks=hg.Checks(tolerance=float("inf"))),
    hg.Implicit(hg.Neumann(5), checks=hg.Checks(tolerance=float("inf"))),
    hg.Implicit(hg.Identity(0.1), checks=hg.Checks(tolerance=float("inf"))),
]


@pytest.mark.parametrize("law", testing.BACKEND_LAWS, ids=lambda law: law.__name__)
def test_backend(law, backend):
    law(backend)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("law", testing.ESTIMATOR_LAWS, ids=lambda law: law.__name__)
def test_estimator(law, estimator, backend):
    law(backend, estimator)


def test_a_third_party_comes_in_through_its_entry_point():
    assert {"numpy", "pebble"} <= {row.name for row in available()}
