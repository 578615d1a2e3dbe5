"""The paper's data sets, read from their original files and prepared as the paper did.

``--data`` is a folder with one folder for each data set:

    mnist/, fashion-mnist/   the four IDX files, as they are or compressed by gzip
    svhn/                    train_32x32.mat and test_32x32.mat, from http://ufldl.stanford.edu/housenumbers/
    cifar10/                 data_batch_1.bin … 5.bin and test_batch.bin, from the binary version at
                             https://www.cs.toronto.edu/~kriz/cifar.html, or cifar10-jpeg.npz, a lossy copy

Without a folder there are scikit-learn's 1797 handwritten digits, for smoke tests.
"""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES = ("digits", "mnist", "fashion-mnist", "svhn", "cifar10")
SVHN = "http://ufldl.stanford.edu/housenumbers/"


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
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))
        x, y = (x[order] / 16).astype(np.float32), y[order]
        return Images(name, "digits", x[:1000], y[:1000], x[1000:], y[1000:], (8, 8, 1))
    if folder is None:
        raise SystemExit(f"{name} is read from files: give their folder by --data, or take --dataset digits")
    read = {"svhn": _svhn, "cifar10": _cifar10}.get(name, _idx)
    x, y, x_test, y_test, title = read(folder / name)
    shape, parts = x.shape[1:], []
    for part in (x, x_test):
        part = part.reshape(len(part), -1).astype(np.float32) / 255
        parts.append(contrast_normalised(part) if name in ("svhn", "cifar10") else part)
    return Images(name, title, parts[0], y.astype(int), parts[1], y_test.astype(int), shape)


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


def _idx(folder):
    def read(name):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                raw = path.read_bytes()
                raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                sizes = np.frombuffer(raw, ">i4", raw[3], 4)
                return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)
        raise SystemExit(f"there is no {folder / name}, with or without .gz")

    train, test = (
        (read(f"{part}-images-idx3-ubyte")[..., None], read(f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    )
    return *train, *test, {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}[folder.name]


def _svhn(folder):
    from scipy.io import loadmat

    parts = []
    for part in ("train", "test"):
        path = folder / f"{part}_32x32.mat"
        if not path.exists():
            raise SystemExit(
                f"there is no {path}; get it from {SVHN}, or let --dataset fashion-mnist stand in"
            )
        found = loadmat(path)
        parts += [found["X"].transpose(3, 0, 1, 2), found["y"].ravel() % 10]
    return *parts, "SVHN"


def _cifar10(folder):
    if (folder / "test_batch.bin").exists():
        parts = []
        for names in ([f"data_batch_{k}.bin" for k in range(1, 6)], ["test_batch.bin"]):
            raw = np.frombuffer(b"".join((folder / name).read_bytes() for name in names), np.uint8)
            raw = raw.reshape(-1, 3073)
            parts += [raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), raw[:, 0]]
        return *parts, "CIFAR-10"
    from PIL import Image

    path = folder / "cifar10-jpeg.npz"
    if not path.exists():
        raise SystemExit(f"there is no {folder}/test_batch.bin (see the head of data.py), nor {path}")
    parts = []
    with np.load(path, allow_pickle=False) as stored:
        for part in ("train", "test"):
            raw, bounds = stored[f"{part}_bytes"].tobytes(), stored[f"{part}_offsets"]
            pieces = (io.BytesIO(raw[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True))
            images = np.stack([np.asarray(Image.open(piece).convert("RGB")) for piece in pieces])
            parts += [images, stored[f"{part}_labels"]]
    return *parts, "CIFAR-10 (JPEG re-encoded)"
