"""The page that writes a backend from scratch: its program runs as it is printed, and obeys every law."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import testing
from hypergrad.backend.protocol import NAMESPACE
from hypergrad.updates import as_update_rule

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

ESTIMATORS = [
    hg.Greedy(hg.SGD(0.1)),
    hg.Unrolled(hg.AdamW(0.02), 4, tape=hg.States()),
    hg.Unrolled(hg.SGD(0.02, momentum=0.9), 4, tape=hg.Reversible()),
    hg.Forward(hg.SGD(0.02), 3),
    hg.Implicit(hg.GMRES(), checks=hg.Checks(tolerance=float("inf"))),
    hg.Implicit(hg.Nystrom(6, damping=1e-9), checks=hg.Checks(tolerance=float("inf"))),
]


@pytest.fixture(scope="module")
def page():
    """What the page's programs define, run one after the other."""
    sys.path.insert(0, str(Path(__file__).parent / "invented"))
    names = {"__name__": "slate_backend"}
    try:
        for program in PROGRAMS:
            exec(compile(program, "docs/backends.md", "exec"), names)
    finally:
        sys.path.pop(0)
    return names


@pytest.fixture(scope="module")
def backend(page):
    return page["SlateBackend"]()


def test_the_program_is_short():
    assert "class SlateBackend(Backend)" in PROGRAMS[0]
    assert len(PROGRAMS[0].splitlines()) <= 100


@pytest.mark.parametrize("law", testing.BACKEND_LAWS, ids=lambda law: law.__name__)
def test_the_backend_obeys(law, backend):
    law(backend)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("law", testing.ESTIMATOR_LAWS, ids=lambda law: law.__name__)
def test_estimators_obey(law, estimator, backend):
    law(backend, estimator)


def test_the_example_is_right(page, backend):
    """Against central differences of fifty steps in NumPy."""

    def trained(lam):
        w = np.zeros(3)
        for _ in range(50):
            w = w - 0.1 * (2.0 * (w - 1.0) / 3.0 + 2.0 * lam * w)
        return np.mean((w - 0.5) ** 2)

    slope = (trained(0.1 + 1e-6) - trained(0.1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(backend.to_numpy(page["hypergradient"]), slope, rtol=1e-7)


def test_another_generator_is_another_noun(page):
    replaced = page["SlateBackendWithRandomness"]()
    assert type(replaced.random) is page["SlateRandom"] and replaced.random.backend is replaced


def test_an_optimiser_is_taken_by_its_name(page):
    momentum = type("Momentum", (), {"rate": 0.1, "__module__": "slate_optim.rules"})()
    assert as_update_rule(momentum) == hg.SGD(0.1, momentum=0.9)


def test_the_list_of_names_is_whole():
    listed = re.search(r"under their names.*?```\n(.*?)```", PAGE, re.DOTALL)
    assert listed is not None and listed[1].split() == list(NAMESPACE)


def test_the_table_of_failures_names_laws():
    named = re.search(r"\| law that fails.*?\n\n", PAGE, re.DOTALL)
    assert named is not None
    rows = [row.split("|")[1] for row in named[0].strip().splitlines()[2:]]
    laws = {law.__name__ for law in testing.BACKEND_LAWS}
    assert rows and all(set(re.findall(r"`(\w+)`", row)) <= laws for row in rows)
