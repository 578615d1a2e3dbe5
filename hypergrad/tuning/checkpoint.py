"""Files of named arrays. A failed write leaves the old file intact, and reading runs no code from a file."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import CheckpointError

_numbers = itertools.count()
_DIGEST = "digest"
"""The name of the array with the hash of all others."""


def write_arrays(path: str | Path, arrays: dict[str, Any]) -> None:
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
            np.savez(file, **{**arrays, _DIGEST: np.array(_digest(arrays))})
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


def read_arrays(path: str | Path) -> dict[str, Any]:
    """Read a file that `write_arrays` wrote; pickled objects are refused.

    No more memory is taken than the file is large, whatever it claims to hold.

    Raises:
        CheckpointError: if the file is damaged, or `write_arrays` did not write it.
        OSError: if it does not exist, or cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            return _read(file)
        except Exception as error:  # damage shows in many ways
            words = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path} is damaged, or was not written by hypergrad: {words}") from error


def _read(file: BinaryIO) -> dict[str, Any]:
    from zipfile import ZIP_STORED, ZipFile  # slow to import, and not needed before now

    with ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise ValueError("an array is there twice")
        if any(member.compress_type != ZIP_STORED for member in members):
            raise ValueError("an array is compressed")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise ValueError("the arrays are larger than the file")
        arrays = {}
        for name, member in zip(names, members, strict=True):
            with archive.open(member) as stream:
                arrays[name] = _array(stream, member.file_size)
    if str(arrays.pop(_DIGEST, "none")) != _digest(arrays):
        raise ValueError("the digest of its arrays is another one, or is missing")
    return arrays


def _digest(arrays: dict[str, Any]) -> str:
    """Return a hash of the names, the dtypes, the shapes and every bit of some arrays."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, values in arrays.items():
        array = np.asarray(values)
        hasher.update(repr((name, array.dtype.str, array.shape)).encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


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


def tree_arrays(backend: Backend, root: str, tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree as NumPy arrays, by their paths from its root."""
    leaves = zip(backend.paths(tree, root), backend.flatten(tree)[0], strict=True)
    return {_key(root, path): backend.to_numpy(leaf) for path, leaf in leaves}


def restore_tree(backend: Backend, root: str, model: Tree, stored: dict[str, Any], path: str | Path) -> Tree:
    """Return a tree like the model, with the stored leaves that `tree_arrays` made.

    Raises:
        CheckpointError: if these have another structure, other shapes or other kinds of numbers.
    """
    leaves, unflatten = backend.flatten(model)
    keys = [_key(root, leaf) for leaf in backend.paths(model, root)]
    stored_keys = {key for key in stored if key.startswith(f"{root}:")}
    if differences := sorted(stored_keys ^ set(keys)):
        raise CheckpointError(f"{path} has another structure; it differs in {', '.join(differences)}")
    restored = []
    for key, leaf in zip(keys, leaves, strict=True):
        values, expected = stored[key], backend.to_numpy(leaf)
        if np.shape(values) != np.shape(expected):
            raise CheckpointError(f"{path}: {key} has shape {values.shape}")
        if values.dtype.kind != expected.dtype.kind:
            raise CheckpointError(f"{path}: {key} holds {values.dtype}")
        restored.append(int(values) if isinstance(leaf, int) else backend.asarray(values, like=leaf))
    return unflatten(restored)


def _key(root: str, path: str) -> str:
    return f"{root}:{path}"
