"""Which tests execute a line, and in which order they are tried."""

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
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
    """Return the tests that execute one of these lines of a module; all of the module's, if none does.

    What is executed at the import (a default, a field, a constant) belongs to no test.
    """
    data = CoverageData(basename=str(folder / MAP))
    data.read()
    by_line = data.contexts_by_lineno(module)

    def tests(contexts):
        return {context.rpartition("|")[0] for context in contexts if context}

    of_lines = tests(chain.from_iterable(by_line.get(line, ()) for line in lines))
    return sorted(of_lines or tests(chain.from_iterable(by_line.values())))


def in_order(tests: list[str], seconds: dict[str, float], module: str, budget: float) -> list[str]:
    """Return tests worth ``budget`` seconds: one of each file in turn, the quick ones first.

    The files of the folder that bears the module's folder's name come first in each turn.
    """
    files = defaultdict(list)
    for test in sorted((test for test in tests if test in seconds), key=seconds.__getitem__):
        files[test.split("::")[0]].append(test)
    home = f"tests/{Path(module).parts[1]}/"
    turns = zip_longest(*(files[file] for file in sorted(files, key=lambda file: not file.startswith(home))))
    chosen, spent = [], 0.0
    for test in filter(None, chain.from_iterable(turns)):
        if chosen and spent + seconds[test] > budget:
            continue
        chosen.append(test)
        spent += seconds[test]
    return chosen
