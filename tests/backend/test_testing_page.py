"""The page on laws: its programs run with objects of a third party, its tables are those of the suites."""

import re
from pathlib import Path

import pebble_backend
import pytest

import hypergrad as hg
from hypergrad import testing

PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SUITES = {
    "Backends": testing.BACKEND_LAWS,
    "Estimators": testing.ESTIMATOR_LAWS,
    "Solvers": testing.SOLVER_LAWS,
    "Tapes": testing.TAPE_LAWS,
    "Update rules": testing.UPDATE_LAWS,
    "Spaces": testing.SPACE_LAWS,
}


def test_the_programs_are_tests_of_each_law():
    theirs = {
        "MySolver": hg.MINRES,
        "MyEstimator": lambda: hg.Greedy(hg.SGD(0.1)),
        "MyTape": hg.States,
        "MyRule": lambda: hg.Adam(0.1),
        "MySpace": hg.Positive,
        "MyBackend": pebble_backend.PebbleBackend,
    }
    space = dict(theirs)
    pytest.importorskip("torch")
    for program in PROGRAMS:
        exec(program, space)
    tests = [value for name, value in space.items() if name.startswith("test_")]
    assert len(tests) == 4 and len(PROGRAMS[0].strip().splitlines()) == 6
    ran = set()
    for test in tests:
        (mark,) = test.pytestmark
        for case in mark.args[1]:
            test(case)
            ran.add(case.law)
    assert ran == {law for laws in SUITES.values() for law in laws}


@pytest.mark.parametrize("name", SUITES)
def test_the_tables_are_those_of_the_suites(name):
    table = PAGE.partition(f"### {name}\n")[2].partition("###")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    said = {
        law.__name__: " ".join(law.__doc__.split("\n\n")[0].split()).replace("``", "`")
        for law in SUITES[name]
    }
    assert rows == said
