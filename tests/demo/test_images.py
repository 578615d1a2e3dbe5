"""Image data sets: every format that a folder may have, and the way to those that download."""

import gzip
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hypergrad.demo import images
from hypergrad.demo.images import load_images
from hypergrad.errors import ArgumentError, MissingExtraError

rng = np.random.default_rng(0)
SIZES = {"train": 7, "t10k": 3}


def idx(values: np.ndarray) -> bytes:
    """Magic number, sizes in big-endian, bytes."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    return header + values.tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_of_mnist(tmp_path: Path, zipped: bool) -> None:
    folder, written = tmp_path / "mnist", {}
    folder.mkdir()
    for part, n in SIZES.items():
        x, y = rng.integers(256, size=(n, 28, 28), dtype=np.uint8), rng.integers(10, size=n, dtype=np.uint8)
        written[part] = x, y
        for name, values in (("images-idx3", x), ("labels-idx1", y)):
            raw = idx(values)
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)
    found = load_images("mnist", tmp_path)
    assert found.title == "MNIST"
    np.testing.assert_array_equal(found.x[..., 0], written["train"][0])
    np.testing.assert_array_equal(found.y, written["train"][1])
    np.testing.assert_array_equal(found.x_test[..., 0], written["t10k"][0])
    np.testing.assert_array_equal(found.y_test, written["t10k"][1])


def test_binary_batches_of_cifar(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    x, y = rng.integers(256, size=(12, 32, 32, 3), dtype=np.uint8), rng.integers(10, size=12, dtype=np.uint8)
    rows = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(12, -1)], 1)
    for k in range(5):
        (folder / f"data_batch_{k + 1}.bin").write_bytes(rows[2 * k : 2 * k + 2].tobytes())
    (folder / "test_batch.bin").write_bytes(rows[10:].tobytes())
    found = load_images("cifar10", tmp_path)
    np.testing.assert_array_equal(np.concatenate([found.x, found.x_test]), x)
    np.testing.assert_array_equal(np.concatenate([found.y, found.y_test]), y)


def test_jpegs_of_cifar(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cifar10").mkdir()
    stored = {}
    for part, n in (("train", 3), ("test", 2)):
        pieces = []
        for k in range(n):
            buffer = io.BytesIO()
            image.fromarray(np.full((32, 32, 3), 40 * (k + 1), np.uint8)).save(buffer, "JPEG", quality=95)
            pieces.append(buffer.getvalue())
        stored[f"{part}_bytes"] = np.frombuffer(b"".join(pieces), np.uint8)
        stored[f"{part}_offsets"] = np.cumsum([0, *map(len, pieces)])
        stored[f"{part}_labels"] = np.arange(n)
    np.savez(tmp_path / "cifar10" / "cifar10-jpeg.npz", **stored)
    found = load_images("cifar10", tmp_path)
    assert "JPEG" in found.title  # a lossy copy says so
    assert found.x.shape == (3, 32, 32, 3) and found.x_test.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(found.x[:, 0, 0, 0], [40, 80, 120], atol=2)


def test_matlab_files_of_svhn(tmp_path: Path) -> None:
    io_of_scipy = pytest.importorskip("scipy.io")
    (tmp_path / "svhn").mkdir()
    x = rng.integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    for part in ("train", "test"):
        path = tmp_path / "svhn" / f"{part}_32x32.mat"
        io_of_scipy.savemat(path, {"X": x.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [2], [9], [10]])})
    found = load_images("svhn", tmp_path)
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_array_equal(found.y, [0, 1, 2, 9, 0])  # its files call a zero 10


def test_digits_need_no_folder() -> None:
    found = load_images("digits")
    assert found.x.shape == (1000, 8, 8, 1) and len(found.x_test) == 797
    assert 0 <= found.x.min() and found.x.max() == 255


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "svhn", "cifar10"])
def test_a_folder_without_the_files_names_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        load_images(name, tmp_path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ArgumentError, match="mnist"):
        load_images("minst")


def test_a_digest_is_of_pairs_in_any_order() -> None:
    x, y = rng.integers(256, size=(9, 2, 2, 1), dtype=np.uint8), np.arange(9)
    order = rng.permutation(9)
    assert images.digest(x, y) == images.digest(x[order], y[order]) != images.digest(x[order], y)


def test_without_a_folder_openml_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn import datasets

    asked = []

    def fetch_openml(name: str, **options: object) -> tuple[np.ndarray, np.ndarray]:
        asked.append((name, options))
        return np.zeros((60002, 784)), np.array(["7"] * 60000 + ["3", "4"])

    monkeypatch.setattr(datasets, "fetch_openml", fetch_openml)
    with pytest.raises(OSError, match="not Fashion-MNIST"):
        load_images("fashion-mnist")
    asked.clear()
    right = images.digest(np.zeros((60002, 784), np.uint8), np.array([7] * 60000 + [3, 4]))
    monkeypatch.setitem(images._DIGESTS, "fashion-mnist", right)
    found = load_images("fashion-mnist")
    assert asked == [("Fashion-MNIST", {"version": 1, "as_frame": False, "return_X_y": True})]
    assert found.x.shape == (60000, 28, 28, 1) and found.y_test.tolist() == [3, 4]


def test_without_a_folder_torchvision_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = rng.integers(256, size=(4, 3, 32, 32), dtype=np.uint8)

    def svhn(root: Path, *, split: str, download: bool) -> SimpleNamespace:
        assert download
        return SimpleNamespace(data=pixels, labels=np.array([split == "test"] * 4, int))

    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(SVHN=svhn))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    found = load_images("svhn")
    np.testing.assert_array_equal(found.x, pixels.transpose(0, 2, 3, 1))
    assert found.y.tolist() == [0] * 4 and found.y_test.tolist() == [1] * 4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingExtraError, match="pip install torchvision"):
        load_images("cifar10")
