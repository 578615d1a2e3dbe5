"""Files of histories and states: what is read is what was written, or a `CheckpointError`."""

import io
import os
import stat
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from support.nightly import rounds

import hypergrad as hg
from hypergrad.errors import CheckpointError, DamagedFileError
from hypergrad.tuning.files import read_arrays, write_arrays

ARRAYS = {
    "state:a": np.arange(12.0).reshape(3, 4),
    "state:b": np.array(7),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "none": np.zeros((0, 3)),
    "words": np.array("numpy"),
    "flags": np.array([True, False]),
}
HEAD = {"format": 1, "recipe": {"every": 3, "rate": 0.1}}
ROUNDS = rounds(300, 10_000)


def equal(mine, other):
    return mine.keys() == other.keys() and all(
        x.dtype == other[name].dtype and x.shape == other[name].shape and np.array_equal(x, other[name])
        for name, x in mine.items()
    )


def flipped(rng, data):
    for k in rng.integers(len(data), size=rng.integers(1, 4)):
        data[k] ^= 1 << rng.integers(8)
    return data


def cut(rng, data):
    return data[: rng.integers(len(data))]


def appended(rng, data):
    return data + bytes(rng.integers(256, size=rng.integers(1, 200), dtype=np.uint8))


def zeroed(rng, data):
    k = rng.integers(len(data))
    data[k : k + rng.integers(1, 500)] = bytes(len(data[k : k + rng.integers(1, 500)]))
    return data


@pytest.fixture
def path(tmp_path):
    write_arrays(tmp_path / "run.npz", HEAD, ARRAYS)
    return tmp_path / "run.npz"


def test_all_kinds_of_arrays_come_back(path):
    head, back = read_arrays(path)
    assert head == HEAD and equal(back, ARRAYS) and all(x.flags.writeable for x in back.values())


@pytest.mark.parametrize("damage", [flipped, cut, appended, zeroed])
def test_damage_is_noticed_or_harmless(path, damage):
    rng, whole, noticed = np.random.default_rng(0), path.read_bytes(), 0
    for _ in range(ROUNDS):
        path.write_bytes(damage(rng, bytearray(whole)))
        try:
            head, arrays = read_arrays(path)
            assert head == HEAD and equal(arrays, ARRAYS)
        except CheckpointError:
            noticed += 1
    assert noticed > ROUNDS / 3 or damage is appended


class TestCrafted:
    @pytest.fixture(autouse=True)
    def _little_memory(self):
        tracemalloc.start()
        yield
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6

    def refuses(self, path, words):
        with pytest.raises(CheckpointError, match=words):
            read_arrays(path)

    def test_a_compressed_array(self, path):
        np.savez_compressed(path, a=np.zeros(100_000))
        self.refuses(path, "compressed")

    @pytest.mark.parametrize("shape", ["(1000000000000,)", "(-1,)", "(2,)", "(1, " * 900])
    def test_a_shape_that_is_not_there(self, path, shape):
        text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", header + bytes(8))
        self.refuses(path, "damaged")

    def test_one_array_under_two_names(self, path):
        with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
            for _ in range(2):
                archive.writestr("a.npy", b"")
        self.refuses(path, "twice")

    def test_arrays_that_share_their_bytes(self, path):
        whole = io.BytesIO()
        np.save(whole, np.zeros(1000))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", whole.getvalue())
            for k in range(200):
                again = zipfile.ZipInfo.__new__(zipfile.ZipInfo)
                for slot in zipfile.ZipInfo.__slots__:
                    if hasattr(archive.infolist()[0], slot):
                        setattr(again, slot, getattr(archive.infolist()[0], slot))
                again.filename = f"b{k}.npy"
                archive.filelist.append(again)
        self.refuses(path, "larger than the file")

    def test_objects(self, path):
        np.savez(path, a=np.array([print], dtype=object))
        self.refuses(path, "objects")


class TestWriting:
    def test_a_file_has_the_mode_of_any_new_file(self, tmp_path):
        write_arrays(tmp_path / "run.npz", HEAD, ARRAYS)
        (tmp_path / "other").touch()
        assert (tmp_path / "run.npz").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_a_mode_that_was_set_stays(self, path):
        path.chmod(0o640)
        write_arrays(path, HEAD, ARRAYS)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_link_stays_a_link(self, path):
        link = path.with_name("latest.npz")
        link.symlink_to(path.name)
        write_arrays(link, HEAD, {"x": np.ones(2)})
        assert link.is_symlink() and read_arrays(path)[1].keys() == {"x"}

    def test_what_a_killed_process_left_is_removed(self, path):
        gone, running = 2**22 + 1, os.getppid()
        left = [path.with_name(f".run.npz.{process}.0.tmp") for process in (gone, running)]
        other = path.with_name(f".another.npz.{gone}.0.tmp")
        for file in (*left, other):
            file.touch()
        write_arrays(path, HEAD, ARRAYS)
        assert [file.exists() for file in (*left, other)] == [False, True, True]


def test_a_file_of_another_program(path):
    np.savez(path, **ARRAYS)
    with pytest.raises(DamagedFileError, match="head"):
        read_arrays(path)


def test_a_file_without_its_digest(path):
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "digest"}
    np.savez(path, **arrays)
    with pytest.raises(DamagedFileError, match="digest"):
        read_arrays(path)


def test_the_head_is_checked_before_memory_is_taken(path):
    write_arrays(path, HEAD, {"large": np.zeros(4_000_000)})

    def refuse(head):
        raise CheckpointError("not mine")

    tracemalloc.start()
    with pytest.raises(CheckpointError, match="not mine"):
        read_arrays(path, refuse)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_history_that_is_no_history(path):
    with pytest.raises(CheckpointError, match="kind"):
        hg.History.load(path)
