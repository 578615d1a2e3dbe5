"""Files of named arrays with a head in JSON.

A failed write leaves the old file intact, and reading runs no code from a file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hypergrad.errors import CheckpointError, DamagedFileError

Head = dict[str, Any]
"""What a file says of its arrays, in the types of JSON."""

_numbers = itertools.count()
_HEAD, _DIGEST = "head", "digest"
"""The names of two more arrays of bytes: the head, and a hash of it and of all other arrays."""


def sealed(head: Head, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays together with their head and a digest, each an array of bytes."""
    text = np.frombuffer(json.dumps(head).encode(), np.uint8)
    arrays = {_HEAD: text, **{name: np.asarray(array) for name, array in arrays.items()}}
    return {**arrays, _DIGEST: _digest(arrays)}


def opened(stored: dict[str, Any], what: str) -> tuple[Head, dict[str, Any]]:
    """Return the head and the arrays that `sealed` put together; ``what`` they are is for the error.

    Raises:
        DamagedFileError: if anything in them has changed.
    """
    with damage_noticed(what):
        arrays = {name: np.asarray(array) for name, array in stored.items()}
        if not np.array_equal(arrays.pop(_DIGEST), _digest(arrays)):
            raise ValueError("the digest of its arrays is another one")
        return _parsed(arrays.pop(_HEAD)), arrays


@contextmanager
def damage_noticed(what: str) -> Iterator[None]:
    """Within this block any error means that ``what`` is read is damaged.

    Raises:
        DamagedFileError: in place of the error, unless that is a `CheckpointError` already.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damage shows in many ways
        words = f"{type(error).__name__}: {error}"
        raise DamagedFileError(f"{what} is damaged, or was not written by hypergrad: {words}") from error


def _parsed(text: Any) -> Head:
    head = json.loads(text.tobytes())
    if not isinstance(head, dict):
        raise ValueError("its head is not an object of JSON")
    return head


def _digest(arrays: dict[str, Any]) -> Any:
    """Return a hash of the names, the dtypes, the shapes and every bit of some arrays, in any order."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        hasher.update(repr((name, array.dtype.str, array.shape)).encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return np.frombuffer(hasher.digest(), np.uint8)


def write_arrays(path: str | Path, head: Head, arrays: dict[str, Any]) -> None:
    """Write an ``.npz`` file beside the old one, flush it to disk, and rename it to replace the old one.

    The file has the mode of the old one, or that of any new file. Where the path is a link, what it leads to
    is replaced. What an interrupted write of this file has left behind is removed.

    Raises:
        OSError: if the file cannot be written; an older file is then unchanged.
    """
    path = Path(os.path.realpath(path))
    _remove_leftovers(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp")
    try:
        with unfinished.open("xb") as file:
            np.savez(file, **sealed(head, arrays))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove the unfinished files of processes that are gone."""
    for unfinished in path.parent.glob(f".{_escaped(path.name)}.*.*.tmp"):
        owner = unfinished.name.split(".")[-3]
        if owner.isdecimal() and not _is_running(int(owner)):
            unfinished.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    """Return a pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # asking is not possible without ending it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def read_arrays(
    path: str | Path, check: Callable[[Head], None] = lambda head: None
) -> tuple[Head, dict[str, Any]]:
    """Read a file that `write_arrays` wrote; pickled objects are refused.

    ``check`` is called with the head before memory is taken for the arrays, and may raise a
    `CheckpointError`. All in all no more memory is taken than a few times the size of the file, whatever the
    file claims to hold.

    Raises:
        DamagedFileError: if the file is damaged, or `write_arrays` did not write it.
        OSError: if it does not exist, or cannot be opened.
    """
    with Path(path).open("rb") as file, damage_noticed(str(path)):
        return opened(_read(file, check), str(path))


def _read(file: BinaryIO, check: Callable[[Head], None]) -> dict[str, Any]:
    from zipfile import ZIP_STORED, ZipFile  # slow to import, and not needed before now

    with ZipFile(file) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("an array is there twice")
        if any(member.compress_type != ZIP_STORED for member in members.values()):
            raise ValueError("an array is compressed")
        if sum(member.file_size for member in members.values()) > os.fstat(file.fileno()).st_size:
            raise ValueError("the arrays are larger than the file")

        def read(name: str) -> Any:
            with archive.open(members[name]) as stream:
                return _array(stream, members[name].file_size)

        check(_parsed(read(_HEAD)))
        return {name: read(name) for name in members}


def _array(stream: Any, size: int) -> Any:
    """Read one array of the format of NumPy, of which so many bytes are there."""
    version = np.lib.format.read_magic(stream)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, by_columns, dtype = headers[version](stream)
    if dtype.hasobject:
        raise ValueError("an array holds objects")
    if math.prod(shape) * dtype.itemsize != size - stream.tell():
        raise ValueError(f"an array of shape {shape} and {dtype} takes other than {size} bytes")
    order: Any = "F" if by_columns else "C"
    return np.ndarray(shape, dtype, bytearray(stream.read()), order=order)
