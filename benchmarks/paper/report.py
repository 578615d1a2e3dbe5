"""What every script does around its study: options, the numbers that test the claim, and the picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper import data
from benchmarks.paper.lab import Lab
from benchmarks.paper.plots import FIGURES, draw
from benchmarks.paper.presets import PRESETS

Options = argparse.Namespace


def report(
    figure: str,
    description: str,
    study: Callable[[Lab], dict[str, str]],
    adapted: Callable[[Options], Options] = lambda options: options,
) -> None:
    """Make a study in the lab that the command line describes; keep, print and draw what it says."""
    options = adapted(arguments(description))
    lab = Lab(options)
    lab.logs.claim(figure, study(lab))
    if options.draw and figure in FIGURES:
        draw(figure, lab.out)


def arguments(description: str) -> Options:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--data", type=Path, help="folder of the data sets; see data.py")
    parser.add_argument("--dataset", choices=data.NAMES)
    parser.add_argument("--backend", choices=("jax", "torch"), default="jax")
    parser.add_argument("--out", type=Path, default=Path("paper-runs"), help="folder of the logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--poor", action="store_true", help="start figures 4 to 6 from poor λ")
    parser.add_argument("--draw", action="store_true", help="draw from the logs, when it has run")
    return parser.parse_args()
