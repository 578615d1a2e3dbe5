"""One method on one problem: what it finds for a budget, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.estimators.comparison.methods import Method, Point
from benchmarks.estimators.comparison.problem import Problem, Sample
from hypergrad.errors import HypergradError

RATE = 0.1
"""Where the search for a rate begins."""


def within(points: Iterator[Point], budget: float) -> tuple[list[Point], str]:
    """Points until the next one would go over the budget, and what went wrong, if anything did."""
    found: list[Point] = []
    try:
        for point in points:
            if found and point.gradients > budget:
                break
            found.append(point)
            if len(found) > 1 and 2 * point.gradients - found[-2].gradients > budget:
                break
    except HypergradError as error:
        return found, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found, ""


def thinned(points: list[Point], count: int) -> list[Point]:
    """About so many of them, the first and the last among them."""
    rows = np.unique(np.linspace(0, len(points) - 1, count).round().astype(int))
    return [points[k] for k in rows]


def race(
    problem: Problem, method: Method, sample: Sample, rate: float | None, points: int, reruns: int
) -> dict[str, Any]:
    """The record of one method: what runs with its hyperparameters fixed end with, along its way."""
    with np.errstate(all="ignore"):  # rates that are too large are part of the comparison
        trail, fault = within(method.points(problem, sample, rate), problem.runs * problem.steps)
        curve = [
            {"gradients": point.gradients, "seconds": point.seconds} | sample.judged(point.hparams, reruns)
            for point in thinned(trail, points)
        ]
    numbers = problem.backend.to_numpy
    last = {name: numbers(leaf).tolist() for name, leaf in trail[-1].hparams.items() if problem.count <= 100}
    held = max(point.bytes_held for point in trail)
    return {"rate": rate, "fault": fault, "curve": curve, "bytes_held": held, "hparams": last}


def settled(loss: Callable[[float], float], most: int) -> list[dict[str, float]]:
    """Rates and losses: three around 0.1, half a decade apart, and on until the best is at no end."""
    tried = {}
    for k in (0, 1, -1)[:most]:
        tried[k] = loss(RATE * 10 ** (k / 2))
    while len(tried) < most:
        best = min(tried, key=tried.__getitem__)
        ahead = best + 1 if best == max(tried) else best - 1
        if ahead in tried:
            break
        tried[ahead] = loss(RATE * 10 ** (ahead / 2))
    return [{"rate": RATE * 10 ** (k / 2), "val_loss": tried[k]} for k in sorted(tried)]


def final(record: dict[str, Any], name: str = "val_loss") -> float:
    """What came out in the end; infinite after a fault, and for what is no number."""
    value = record["curve"][-1][name]
    return math.inf if record["fault"] or not math.isfinite(value) else value


def later(record: dict[str, Any]) -> float:
    """The mean validation loss of the second half of the way: no rate is chosen for a lucky end."""
    losses = [row["val_loss"] for row in record["curve"][len(record["curve"]) // 2 :]]
    return math.inf if record["fault"] or not np.isfinite(losses).all() else float(np.mean(losses))


def by(record: dict[str, Any], gradients: float) -> float:
    """The validation loss of what had been found for so many gradients; infinite as above."""
    row = next(row for row in reversed(record["curve"]) if row["gradients"] <= gradients)
    return math.inf if record["fault"] or not math.isfinite(row["val_loss"]) else row["val_loss"]
