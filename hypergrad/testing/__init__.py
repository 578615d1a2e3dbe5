"""Conformance suites for backends and estimators, ours and third parties'.

With pytest, for a backend ``MineBackend``::

    import pytest
    from hypergrad import testing

    @pytest.mark.parametrize("law", testing.BACKEND_LAWS, ids=lambda law: law.__name__)
    def test_backend(law):
        law(MineBackend())

A law of `BACKEND_LAWS` is a function of a backend, one of `ESTIMATOR_LAWS` a function of a backend and an
estimator. It raises ``AssertionError`` if it is broken; no test framework is needed to call it. Laws are
about float64 unless they say otherwise, on small problems of their own.
"""

from hypergrad.testing.backend_laws import BACKEND_LAWS
from hypergrad.testing.estimator_laws import ESTIMATOR_LAWS

__all__ = ["BACKEND_LAWS", "ESTIMATOR_LAWS"]
