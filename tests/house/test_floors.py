"""The order of the rooms: imports run downwards only, typing and deferred ones counted."""

import ast
from pathlib import Path

import pytest

import hypergrad

ROOT = Path(hypergrad.__file__).parent
FLOORS = [
    ["errors", "version"],
    ["backend"],
    ["updates", "solvers"],
    ["problems"],
    ["tapes", "second_order"],
    ["estimators"],
    ["tuning", "checks"],
    ["testing"],
    ["demo", "integrations"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(path):
    """The rooms that a file imports from, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hypergrad":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("hypergrad."))


def files(room):
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


def test_every_room_has_a_floor():
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} <= set(FLOOR)


@pytest.mark.parametrize("room", [room for room in FLOOR if (ROOT / room).is_dir()])
def test_imports_run_downwards(room):
    for path in files(room):
        for other in rooms_imported(path):
            if other != room:
                assert FLOOR[other] < FLOOR[room], f"{path.relative_to(ROOT)} imports {other}"


@pytest.mark.parametrize("room", [room for room in FLOOR if (ROOT / room).is_dir()])
def test_no_circle_within_a_room(room):
    modules = {
        ".".join(("hypergrad", *path.relative_to(ROOT).with_suffix("").parts)): path for path in files(room)
    }
    arrows = {
        name: {other for other in modules_imported(path) if other in modules and other != name}
        for name, path in modules.items()
    }
    while arrows:
        leaves = {name for name, others in arrows.items() if not others & set(arrows)}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: others for name, others in arrows.items() if name not in leaves}


def modules_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_file_is_long():
    assert {p.name for p in ROOT.rglob("*.py") if len(p.read_text().splitlines()) > 400} == set()
