"""How large everything is: what a preset has for any data set, and what one data set has of its own in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.paper.methods import FIRST, METHODS, Method

THREE, FIVE = (2000,) * 3, (4000, 2000, 1000, 500, 250)


@dataclass(frozen=True)
class Preset:
    """How large everything is.

    ``dataset`` is the one that is taken where none is named; ``size`` counts the images in T1 and in T2;
    ``layers`` are the nets, by their hidden widths, or by their channels where they are convolutional. In
    ``tied`` each layer has the same noise and L2, or one of its own. ``epochs`` are passes over T1; the sweep
    of figures 4 to 6 has so many ``starts`` and these ``methods``; ``points`` are those at which a curve is
    measured, and as many starts as a ``chunk`` has share a file, and in JAX a program.

    ``travel`` multiplies the rates of an Adam that moves λ. Its steps have a fixed size, so a run with fewer
    updates than the paper's would not get as far; gradient descent keeps the paper's rates.
    """

    dataset: str
    size: tuple[int, int]
    layers: tuple[tuple[int, ...], ...]
    epochs: int
    starts: int
    grid: int
    trajectories: int
    points: int
    chunk: int
    travel: float
    repeats: int
    tied: tuple[bool, ...] = (True,)
    methods: tuple[Method, ...] = METHODS


PRESETS = {
    "smoke": Preset(
        dataset="digits",
        size=(500, 500),
        layers=((20, 20),),
        epochs=4,
        starts=3,
        grid=3,
        trajectories=2,
        points=2,
        chunk=8,
        travel=20.0,
        repeats=2,
    ),
    "small": Preset(
        dataset="mnist",
        size=(2000, 1000),
        layers=((100, 100, 100),),
        epochs=50,
        starts=10,
        grid=6,
        trajectories=6,
        points=20,
        chunk=49,
        travel=20.0,
        repeats=15,
    ),
    "paper": Preset(
        dataset="mnist",
        size=(55000, 5000),
        layers=(THREE, FIVE),
        epochs=200,
        starts=20,
        grid=10,
        trajectories=8,
        points=40,
        chunk=4,
        travel=1.0,
        repeats=15,
        tied=(True, False),
    ),
}

OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("smoke", "svhn"): {"tied": (False,)},
    ("smoke", "cifar10"): {"layers": ((4, 8),), "chunk": 1},
    ("small", "digits"): {"size": (500, 500)},
    ("small", "svhn"): {"tied": (False,)},
    # So dear is a step that four starts by one method take 40 minutes on cores that do other work.
    ("small", "cifar10"): {
        "layers": ((8, 32),),
        "chunk": 1,
        "size": (5000, 1000),
        "epochs": 8,
        "starts": 4,
        "methods": (FIRST, replace(FIRST, own=True)),
    },
    ("paper", "mnist"): {"layers": ((1000,) * 3, FIVE)},
    ("paper", "svhn"): {"size": (65000, 8257), "tied": (False,)},
    ("paper", "cifar10"): {"size": (45000, 5000), "layers": ((96, 192),), "chunk": 1},
}


def preset_for(name: str, dataset: str) -> Preset:
    return replace(PRESETS[name], **OWN.get((name, dataset), {}))
