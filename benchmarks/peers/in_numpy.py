"""The workloads in NumPy, for hypergrad's reference backend. No peer runs here; it is one more witness."""

import math
import tracemalloc
from importlib.metadata import version
from typing import Any

import autograd.numpy as np
import numpy

from benchmarks.peers.eager import counting as counting
from benchmarks.peers.eager import program as program
from benchmarks.peers.eager import wait as wait
from benchmarks.peers.frameworks import Entry, Task
from benchmarks.peers.losses import Words

NAME = "numpy"


def versions() -> dict[str, str]:
    return {"autograd": version("autograd")}


def cross_entropy(logits: Any, labels: Any) -> Any:
    logits = logits - np.max(logits, axis=1, keepdims=True)
    chosen = logits[np.arange(len(labels)), labels]
    return np.mean(np.log(np.sum(np.exp(logits), axis=1)) - chosen)


WORDS = Words(np, np.asarray, cross_entropy, lambda z: np.logaddexp(0.0, z), np.dot)


def memory(task: Task, entry: Entry) -> float:
    """The peak of what tracemalloc sees."""
    run = program(task, entry)
    tracemalloc.start()
    try:
        run()
        return float(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def products(task: Task, entry: Entry) -> float:
    return math.nan


def value(found: Any) -> numpy.ndarray:
    return numpy.asarray(found)


def by_hand(task: Task) -> list[Entry]:
    return []
