"""Conformance suites for backends, estimators, solvers, tapes, update rules and spaces, of anyone.

With pytest, three lines make a test of each law::

    from hypergrad.testing import parametrize_with_laws

    @parametrize_with_laws(MySolver(), backends=["numpy", "torch"])
    def test_laws(law):
        law()

A law is a function of a backend, and of the object that must obey it if that is not the backend itself. It
raises ``AssertionError`` if it is broken; without a test framework, call each of `cases`. Laws are about
float64 unless they say otherwise, on small problems of their own.
"""

from hypergrad.testing.backend_laws import BACKEND_LAWS
from hypergrad.testing.estimator_laws import ESTIMATOR_LAWS
from hypergrad.testing.solver_laws import SOLVER_LAWS
from hypergrad.testing.space_laws import SPACE_LAWS
from hypergrad.testing.suites import Case, cases, laws_of, parametrize_with_laws
from hypergrad.testing.tape_laws import TAPE_LAWS
from hypergrad.testing.update_laws import UPDATE_LAWS

__all__ = [
    "BACKEND_LAWS",
    "ESTIMATOR_LAWS",
    "SOLVER_LAWS",
    "SPACE_LAWS",
    "TAPE_LAWS",
    "UPDATE_LAWS",
    "Case",
    "cases",
    "laws_of",
    "parametrize_with_laws",
]
