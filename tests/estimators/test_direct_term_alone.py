"""A C2 without parameters: the hypergradient is its direct term, with a warning."""

import numpy as np
import pytest
from support.frameworks import each_backend

import hypergrad as hg
from hypergrad import errors

RULE = hg.SGD(0.1)
ESTIMATORS = {
    "greedy": hg.Greedy(RULE),
    "full": hg.Unrolled(RULE, 3),
    "states": hg.Unrolled(RULE, 3, tape=hg.States()),
    "forward": hg.Forward(RULE, 3),
    "cg": hg.Implicit(hg.CG(), checks=hg.Checks(away="ignore")),
    "direct": hg.Implicit(hg.Direct(), checks=hg.Checks(away="ignore")),
}


@each_backend
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_it_is_given_with_a_warning(backend, estimator):
    xp = backend.xp
    problem = hg.Bilevel(lambda p, h, b: xp.sum((p - 1.0) ** 2) + h * xp.sum(p**2), lambda p, h, b: -(h**2))
    params, lam = (backend.asarray(x, like=None) for x in (np.array([0.3, -0.2]), np.array(0.7)))
    with pytest.warns(errors.ZeroResponseWarning, match="does not depend on any leaf of params"):
        found = hg.hypergradient(problem, params, lam, None, None, estimator)
    assert float(backend.to_numpy(found)) == pytest.approx(-1.4, rel=1e-12)


@each_backend
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_c2_of_neither_is_an_error(backend, estimator):
    xp = backend.xp
    problem = hg.Bilevel(
        lambda p, h, b: xp.sum((p - 1.0) ** 2) + h * xp.sum(p**2),
        lambda p, h, b: backend.asarray(np.array(1.0), like=None),
    )
    params, lam = (backend.asarray(x, like=None) for x in (np.array([0.3, -0.2]), np.array(0.7)))
    with pytest.raises(errors.DisconnectedError):
        hg.hypergradient(problem, params, lam, None, None, estimator)
