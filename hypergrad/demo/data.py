"""Real data that is included in scikit-learn, split into T1, T2 and test."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from hypergrad.errors import ArgumentError, MissingExtraError

LOADERS = {"breast-cancer": "load_breast_cancer", "digits": "load_digits", "wine": "load_wine"}
"""Data sets by name, with the function of ``sklearn.datasets`` that reads each."""


class Split(NamedTuple):
    """Inputs (n, features) and one-hot labels (n, classes)."""

    x: Any
    y: Any


class Data(NamedTuple):
    """A data set in three parts."""

    name: str
    train: Split
    val: Split
    test: Split


def load(name: str, seed: int) -> Data:
    """Load a data set, standardise it by T1's own mean and scale, and split it 28 : 28 : 44 at random.

    Raises:
        ArgumentError: for a name that is not in `LOADERS`.
        MissingExtraError: if scikit-learn is not installed.
    """
    if name not in LOADERS:
        raise ArgumentError(f"unknown data set {name!r}; available: {', '.join(sorted(LOADERS))}")
    if find_spec("sklearn") is None:
        raise MissingExtraError("data sets need scikit-learn: python -m pip install 'hypergradients[demo]'")
    from sklearn import datasets

    x, labels = getattr(datasets, LOADERS[name])(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order].astype(float), np.eye(labels.max() + 1)[labels[order]]
    first, second = round(0.28 * len(x)), round(0.56 * len(x))
    mean = x[:first].mean(axis=0)
    # All pixels of an image share a scale; each feature of a table has its own.
    scale = x[:first].std() if name == "digits" else x[:first].std(axis=0) + 1e-12
    x = (x - mean) / scale
    parts = (slice(0, first), slice(first, second), slice(second, None))
    return Data(name, *(Split(x[part], y[part]) for part in parts))
