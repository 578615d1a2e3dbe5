"""The command line: the main job, and one clear line for whatever is wrong."""

import json
import sys

import pytest

import hypergrad.demo  # noqa: F401
from hypergrad.demo.cli import main

FAST = ["compare", "--steps", "16", "--data", "wine"]


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    arena = sys.modules["hypergrad.demo.compare"]  # the package's own name for it is the function
    monkeypatch.setattr(arena, "WARM_UP", 5)
    monkeypatch.setattr(arena, "HORIZON", 5)


def fails(capsys, *arguments):
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_the_main_job_in_short(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # a terminal that is wide enough for the names
    assert main([*FAST, "--out", str(tmp_path / "new")]) == 0
    out, _ = capsys.readouterr()
    written = json.loads((tmp_path / "new" / "comparison.json").read_text())
    names = [row["name"] for row in written["contestants"]]
    assert all(name in out for name in names) and len(names) == 6
    assert (tmp_path / "new" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    unrolled = written["contestants"][-1]
    assert unrolled["relative_error"] < 1e-6 and unrolled["cosine"] == pytest.approx(1.0)


def test_quiet_is_quiet(capsys, tmp_path):
    assert main([*FAST, "--quiet", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")


def test_backends_are_listed(capsys, monkeypatch):
    assert main(["backends"]) == 0
    assert "numpy      installed" in capsys.readouterr().out
    monkeypatch.setattr("hypergrad.backend.registry.find_spec", lambda name: None)
    assert main(["backends"]) == 0
    assert "missing: python -m pip install 'hypergradients[numpy]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "required"),
        (["compete"], "invalid choice"),
        (["compare", "--speed", "3"], "--speed"),
        (["compare", "--steps", "0"], "--steps"),
        (["compare", "--steps", "many"], "--steps"),
        (["compare", "--seed", "-1"], "--seed"),
        (["compare", "--data", "cifar"], "breast-cancer, digits, wine"),
        (["compare", "--backend", "abacus"], "no backend 'abacus'"),
    ],
)
def test_a_wrong_option_gets_one_line(capsys, arguments, says):
    assert says in fails(capsys, *arguments)


def test_an_output_that_cannot_be_written_is_known_before_the_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, *FAST, "--out", str(tmp_path / "file"))


def test_a_missing_extra_names_the_command(capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    assert "pip install 'hypergradients[demo]'" in fails(capsys, *FAST)
