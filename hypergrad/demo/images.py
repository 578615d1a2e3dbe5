"""Image data sets, from a folder of their original files or from the network.

    mnist/, fashion-mnist/   the four IDX files, plain or compressed by gzip
    svhn/                    train_32x32.mat and test_32x32.mat, from http://ufldl.stanford.edu/housenumbers/
    cifar10/                 data_batch_1.bin … 5.bin and test_batch.bin, from the binary version at
                             https://www.cs.toronto.edu/~kriz/cifar.html, or cifar10-jpeg.npz, a lossy copy

``digits``, scikit-learn's 1797 small images, need neither.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hypergrad.errors import ArgumentError, MissingExtraError

TITLES = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR-10",
}
"""Data sets by name."""


_DIGESTS = {
    "mnist": "2f2b79689234621ec69cf3857d96b026",
    "fashion-mnist": "688b4b774a0e62ad99e1c4331089fc50",
}
"""`digest` of the original files."""


class Images(NamedTuple):
    """Images (n, height, width, channels) with values from 0 to 255, and labels (n,) from 0 to 9."""

    title: str
    x: Any
    y: Any
    x_test: Any
    y_test: Any


def load_images(name: str, folder: str | Path | None = None) -> Images:
    """Read a data set from ``folder / name``, or download it if no folder is given.

    MNIST and Fashion-MNIST come from OpenML by scikit-learn's ``fetch_openml``, SVHN and CIFAR-10 by
    ``torchvision.datasets``; both cache their downloads, in ``~/scikit_learn_data`` and in
    ``~/.cache/hypergrad``. The former come over https and are checked here, the latter by torchvision itself.

    Raises:
        ArgumentError: for a name that is not in `TITLES`.
        FileNotFoundError: naming the file that the folder lacks.
        MissingExtraError: if the package that reads or downloads it is not installed.
        OSError: if the download fails, or is not the data set that it should be.
    """
    if name not in TITLES:
        raise ArgumentError(f"unknown data set {name!r}; available: {', '.join(TITLES)}")
    if name == "digits":
        return _digits()
    if folder is None:
        return (_from_torchvision if name in ("svhn", "cifar10") else _from_openml)(name)
    reader: Callable[[Path], Images] = {"svhn": _svhn, "cifar10": _cifar10}.get(name, _idx)
    return reader(Path(folder) / name)


def _package(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this data set needs {module}: python -m pip install {distribution}"
        ) from error


def _digits() -> Images:
    x, y = _package("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] * (255 / 16)).reshape(-1, 8, 8, 1), y[order]
    return Images("digits", x[:1000], y[:1000], x[1000:], y[1000:])


def digest(x: Any, y: Any) -> str:
    """Return a hash of the pairs of an image and its label, whatever their order."""
    rows = np.concatenate([x.reshape(len(x), -1), y.astype(np.uint8)[:, None]], axis=1)
    each = sorted(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
    return hashlib.blake2b(b"".join(each), digest_size=16).hexdigest()


def _from_openml(name: str) -> Images:
    fetch = _package("sklearn.datasets", "scikit-learn").fetch_openml
    x, y = fetch(
        {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST"}[name],
        version=1,
        as_frame=False,
        return_X_y=True,
    )
    x, y = np.asarray(x, np.uint8).reshape(-1, 28, 28, 1), np.asarray(y).astype(int)
    if (found := digest(x, y)) != _DIGESTS[name]:
        raise OSError(f"what OpenML returned is not {TITLES[name]}: its digest is {found}")
    return Images(TITLES[name], x[:60000], y[:60000], x[60000:], y[60000:])


def _from_torchvision(name: str) -> Images:
    datasets = _package("torchvision.datasets", "torchvision")
    root, parts = Path.home() / ".cache" / "hypergrad", []
    for train in (True, False):
        if name == "cifar10":
            dataset = datasets.CIFAR10(root, train=train, download=True)
            parts += [np.asarray(dataset.data), np.asarray(dataset.targets)]
        else:
            dataset = datasets.SVHN(root, split="train" if train else "test", download=True)
            parts += [np.asarray(dataset.data).transpose(0, 2, 3, 1), np.asarray(dataset.labels)]
    return Images(TITLES[name], *parts)


def _idx(folder: Path) -> Images:
    def read(name: str) -> Any:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                raw = path.read_bytes()
                raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                sizes = np.frombuffer(raw, ">i4", raw[3], 4)
                return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)
        raise FileNotFoundError(f"there is no {folder / name}, with or without .gz")

    train, test = (
        (read(f"{part}-images-idx3-ubyte")[..., None], read(f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    )
    return Images(TITLES[folder.name], *train, *test)


def _svhn(folder: Path) -> Images:
    parts = []
    for part in ("train", "test"):
        path = folder / f"{part}_32x32.mat"
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}; it is at http://ufldl.stanford.edu/housenumbers/")
        stored = _package("scipy.io", "scipy").loadmat(path)
        parts += [stored["X"].transpose(3, 0, 1, 2), stored["y"].ravel() % 10]
    return Images("SVHN", *parts)


def _cifar10(folder: Path) -> Images:
    parts = []
    if (folder / "test_batch.bin").exists():
        for names in ([f"data_batch_{k}.bin" for k in range(1, 6)], ["test_batch.bin"]):
            raw = np.frombuffer(b"".join((folder / name).read_bytes() for name in names), np.uint8)
            raw = raw.reshape(-1, 3073)
            parts += [raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), raw[:, 0]]
        return Images("CIFAR-10", *parts)
    path = folder / "cifar10-jpeg.npz"
    if not path.exists():
        raise FileNotFoundError(f"there is neither {folder / 'test_batch.bin'} nor {path}")
    decode = _package("PIL.Image", "pillow").open
    with np.load(path, allow_pickle=False) as stored:
        for part in ("train", "test"):
            raw, bounds = stored[f"{part}_bytes"].tobytes(), stored[f"{part}_offsets"]
            pieces = (io.BytesIO(raw[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True))
            images = np.stack([np.asarray(decode(piece).convert("RGB")) for piece in pieces])
            parts += [images, stored[f"{part}_labels"]]
    return Images("CIFAR-10 (JPEG re-encoded)", *parts)
