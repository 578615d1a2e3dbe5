"""The paper's data sets, prepared as the paper did.

``--data`` is a folder with one folder for each data set, see ``hypergrad.demo.images``. Without it there are
scikit-learn's 1797 handwritten digits, and a set that ``--dataset`` names is downloaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.demo.images import TITLES, load_images

NAMES = tuple(TITLES)
BATCH = 100


@dataclass(frozen=True)
class Images:
    """Images as rows, not centred yet: T1 and T2 are drawn from ``x``; the test set is whole."""

    name: str
    title: str
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """Which images are T1 and T2, and by T1's statistics: what is subtracted, and what multiplied."""

    t1: np.ndarray
    t2: np.ndarray
    centre: np.ndarray
    whiten: np.ndarray | None


def load(name: str, folder: Path | None) -> Images:
    """From the folder, or from the network where there is none; see `hypergrad.demo.images.load_images`."""
    found = load_images(name, folder)
    parts = [
        part.reshape(len(part), -1).astype(np.float32) / np.float32(255) for part in (found.x, found.x_test)
    ]
    if name in ("svhn", "cifar10"):
        parts = [contrast_normalised(part) for part in parts]
    labels = found.y.astype(int), found.y_test.astype(int)
    return Images(name, found.title, parts[0], labels[0], parts[1], labels[1], found.x.shape[1:])


def split(images: Images, size1: int, size2: int, seed: int) -> Split:
    """T1 and T2 at random, another for each seed."""
    order = np.random.default_rng((seed, 0)).permutation(len(images.x))
    if size1 + size2 > len(order):
        raise SystemExit(f"{images.title} has {len(order)} images, T1 and T2 would need {size1 + size2}")
    t1, t2 = order[:size1], order[size1 : size1 + size2]
    if images.name == "svhn":  # contrast normalisation only
        return Split(t1, t2, np.zeros(images.x.shape[1], np.float32), None)
    centre = images.x[t1].mean(axis=0)
    return Split(t1, t2, centre, whitening(images.x[t1] - centre) if images.name == "cifar10" else None)


def contrast_normalised(x: np.ndarray) -> np.ndarray:
    """Each image with mean 0 and standard deviation 1."""
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.maximum(x.std(axis=1, keepdims=True), 1e-4)


def whitening(x: np.ndarray, floor: float = 0.1) -> np.ndarray:
    """The symmetric (ZCA) whitening matrix of centred rows."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return ((vectors / np.sqrt(values + floor)) @ vectors.T).astype(np.float32)


def prepared(start: Any, x: Any) -> Any:
    """Centred and whitened by the `Split` of this start, in any framework's arrays."""
    x = x - start["centre"]
    return x @ start["whiten"] if "whiten" in start else x


def order(rows: np.ndarray, seed: tuple[int, ...], first: int, steps: int) -> np.ndarray:
    """Which images each step sees: all of them once before any comes again, in a new order each time."""
    an_epoch, batches, epoch = len(rows) // BATCH, [], None
    for t in range(first, first + steps):
        if epoch != t // an_epoch:
            epoch = t // an_epoch
            shuffled = np.random.default_rng((*seed, epoch)).permutation(rows)
        batches.append(shuffled[t % an_epoch * BATCH :][:BATCH])
    return np.stack(batches).astype(np.int32)
