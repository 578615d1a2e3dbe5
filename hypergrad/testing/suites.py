"""Which laws an object must obey, and a decorator that makes a test of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Backend, get_backend
from hypergrad.estimators import HypergradientEstimator
from hypergrad.solvers import Solver
from hypergrad.tapes import Tape
from hypergrad.testing.backend_laws import BACKEND_LAWS
from hypergrad.testing.estimator_laws import ESTIMATOR_LAWS
from hypergrad.testing.solver_laws import SOLVER_LAWS
from hypergrad.testing.space_laws import SPACE_LAWS
from hypergrad.testing.tape_laws import TAPE_LAWS
from hypergrad.testing.update_laws import UPDATE_LAWS
from hypergrad.tuning import Space
from hypergrad.updates import as_update_rule

Law = Callable[..., None]
"""A function of a backend and, except for a law of backends, of the object that obeys it."""

_SUITES: dict[type, Sequence[Law]] = {
    HypergradientEstimator: ESTIMATOR_LAWS,
    Solver: SOLVER_LAWS,
    Tape: TAPE_LAWS,
    Space: SPACE_LAWS,
}


@final
@dataclass(frozen=True)
class Case:
    """A law, and what it is about. Calling it raises `AssertionError` where the law is broken."""

    law: Law
    backend: Backend
    subject: Any

    def __call__(self) -> None:
        self.law(self.backend, *([] if self.subject is self.backend else [self.subject]))

    def __str__(self) -> str:
        # An address would make the names of tests other ones in each process.
        subject = re.sub(r" at 0x\w+", "", repr(self.subject))
        return f"{self.law.__name__}-{self.backend.name}-{subject}"


def laws_of(subject: Any) -> Sequence[Law]:
    """Return the laws for a backend, an estimator, a solver, a tape, a space or an update rule.

    Raises:
        ArgumentError: for anything else.
    """
    if isinstance(subject, Backend):
        return BACKEND_LAWS
    for kind, laws in _SUITES.items():
        if isinstance(subject, kind):
            return laws
    as_update_rule(subject)  # which may be of many types, and raises
    return UPDATE_LAWS


def cases(*subjects: Any, backends: Sequence[Backend | str] = ("numpy",)) -> Iterator[Case]:
    """Yield a case for each law of each subject, on each backend; a backend is its own.

    Raises:
        ArgumentError: as `laws_of`.
        BackendError: for the name of a backend that is not registered or installed.
    """
    for subject in subjects:
        if isinstance(subject, Backend):
            yield from (Case(law, subject, subject) for law in BACKEND_LAWS)
            continue
        for backend in backends:
            found = get_backend(backend) if isinstance(backend, str) else backend
            yield from (Case(law, found, subject) for law in laws_of(subject))


def parametrize_with_laws(*subjects: Any, backends: Sequence[Backend | str] = ("numpy",)) -> Any:
    """Return a decorator of pytest, by which a test is called with each `Case` as its argument ``law``.

    ::

        @parametrize_with_laws(MySolver(), MyTape(), backends=["numpy", "torch"])
        def test_laws(law):
            law()

    Raises:
        As `cases`.
    """
    import pytest

    return pytest.mark.parametrize("law", list(cases(*subjects, backends=backends)), ids=str)
