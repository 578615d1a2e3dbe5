"""Which tests execute a line, and in which order they are tried."""

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

from coverage import CoverageData

MAP = "coverage.db"  # which test executed which line
DURATIONS = "durations.xml"


def durations(folder: Path) -> dict[str, float]:
    """Return the seconds of each test of the map, by its name."""
    cases = ElementTree.parse(folder / DURATIONS).iter("testcase")
    passed = [case for case in cases if not len(case)]  # a skip and a failure are children
    return {_name(case): float(case.get("time")) for case in passed}


def _name(case: ElementTree.Element) -> str:
    """``tests.solvers.test_cg.TestCG`` and ``test_it[numpy]`` as pytest takes them."""
    file, *classes = re.split(r"\.(?=[A-Z])", case.get("classname"))
    return "::".join([file.replace(".", "/") + ".py", *classes, case.get("name")])


def covering(folder: Path, module: str, lines: range) -> list[str]:
    """Return the tests that execute one of these lines of a module.

    What is executed at an import (a default, a field, a value that tests share) belongs to no test: then
    these are all tests that execute anything of the module.
    """
    data = CoverageData(basename=str(folder / MAP))
    data.read()
    by_line = data.contexts_by_lineno(module)

    def tests(contexts):
        return {context.rpartition("|")[0] for context in contexts if context}

    of_lines = set(chain.from_iterable(by_line.get(line, ()) for line in lines))
    at_import = "" in of_lines or not of_lines
    return sorted(tests(chain.from_iterable(by_line.values()) if at_import else of_lines))


def in_order(tests: list[str], seconds: dict[str, float], module: str, budget: float) -> list[str]:
    """Return tests worth ``budget`` seconds, of each file in turn, the quick ones first.

    Two thirds of the time are for the folder of tests that bears the name of the module's folder.
    """
    home = f"tests/{Path(module).parts[1]}/"
    timed = sorted((test for test in tests if test in seconds), key=seconds.__getitem__)
    first = _within(2 * budget / 3, _in_turn([test for test in timed if test.startswith(home)]), seconds)
    left = budget - sum(seconds[test] for test in first)
    chosen = set(first)
    return first + _within(left, _in_turn([test for test in timed if test not in chosen]), seconds)


def _in_turn(tests: list[str]) -> Iterator[str]:
    """Take one test of each file, then the next one of each, and so on."""
    files = defaultdict(list)
    for test in tests:
        files[test.split("::")[0]].append(test)
    return filter(None, chain.from_iterable(zip_longest(*files.values())))


def _within(budget: float, tests: Iterable[str], seconds: dict[str, float]) -> list[str]:
    """Return those that fit into the budget; at least one, if there is any."""
    chosen, spent = [], 0.0
    for test in tests:
        if not chosen or spent + seconds[test] <= budget:
            chosen.append(test)
            spent += seconds[test]
    return chosen
