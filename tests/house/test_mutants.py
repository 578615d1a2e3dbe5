"""The tool that mutates the library draws what can be told from it, and picks the tests near it first."""

import pytest
from mutants.covering import in_order

HOME = [f"tests/solvers/test_cg.py::test_{k}" for k in range(4)]
AWAY = [f"tests/tapes/test_{name}.py::test_{k}" for name in "ab" for k in range(3)]
SECONDS = dict.fromkeys(HOME + AWAY, 1.0)


def test_two_thirds_of_the_time_are_for_the_folders_own_tests():
    chosen = in_order(HOME + AWAY, SECONDS, "hypergrad/solvers/cg.py", 6.0)
    assert chosen[:4] == HOME
    assert chosen[4:] == ["tests/tapes/test_a.py::test_0", "tests/tapes/test_b.py::test_0"]


def test_a_test_that_is_dearer_than_the_budget_is_taken_if_there_is_no_other():
    assert in_order(HOME[:1], {HOME[0]: 100.0}, "hypergrad/solvers/cg.py", 6.0) == HOME[:1]
    assert in_order(["tests/skipped.py::test"], SECONDS, "hypergrad/solvers/cg.py", 6.0) == []


def test_shares_are_in_proportion_and_add_up():
    draw = pytest.importorskip("mutants.draw", reason="needs cosmic-ray")
    assert draw.shares({"a": 500, "b": 300, "c": 201}, 10) == {"a": 5, "b": 3, "c": 2}
    assert sum(draw.shares({"a": 1, "b": 1, "c": 1}, 10).values()) == 10


def test_no_annotation_and_no_star_is_mutated(tmp_path):
    draw = pytest.importorskip("mutants.draw", reason="needs cosmic-ray")
    source = "def f(x: int | None, *, y: int = 1):\n    return x + y * g(**x)\n"
    (module := tmp_path / "module.py").write_text(source)

    def held(text, line):
        column = source.splitlines()[line - 1].index(text)
        found = draw.MutationSpec(
            module, "core/ReplaceBinaryOperator_A_B", 0, (line, column), (line, column + len(text))
        )
        return draw.Places(module).hold(found)

    assert held("+", 2) and held("*", 2)
    assert not (held("|", 1) or held("*", 1) or held("**", 2))
