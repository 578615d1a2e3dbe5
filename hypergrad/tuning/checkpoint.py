"""Files of named arrays. A write that fails leaves the old file, and a read runs no code of the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import CheckpointError


def write_arrays(path: str | Path, arrays: dict[str, Any]) -> None:
    """Write an ``.npz`` file beside the old one, flush it to the disk, and put it in its place.

    Raises:
        OSError: if that is not possible; an older file is then left as it was.
    """
    from tempfile import NamedTemporaryFile  # slow to import, and not needed before now

    path = Path(path)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_arrays(path: str | Path) -> dict[str, Any]:
    """Read a file that `write_arrays` wrote; pickled objects are refused.

    Raises:
        CheckpointError: if it is damaged or no such file.
        FileNotFoundError: if there is none.
    """
    from zipfile import BadZipFile

    try:
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (BadZipFile, ValueError, TypeError, LookupError, EOFError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged, or was not written by hypergrad: {error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} claims to hold more than fits in memory: {error}") from error


def tree_arrays(backend: Backend, root: str, tree: Tree) -> dict[str, Any]:
    """The leaves of a tree as NumPy arrays, by their paths from its root."""
    leaves = zip(backend.paths(tree, root), backend.flatten(tree)[0], strict=True)
    return {_key(root, path): backend.to_numpy(leaf) for path, leaf in leaves}


def restore_tree(backend: Backend, root: str, model: Tree, stored: dict[str, Any], path: str | Path) -> Tree:
    """A tree like the model, with the leaves that `tree_arrays` made.

    Raises:
        CheckpointError: if they belong to a tree of another structure, with other shapes or kinds of numbers.
    """
    leaves, unflatten = backend.flatten(model)
    wanted = [_key(root, leaf) for leaf in backend.paths(model, root)]
    held = {key for key in stored if key.startswith(f"{root}:")}
    if differences := sorted(held ^ set(wanted)):
        raise CheckpointError(f"{path} has another structure; it differs in {', '.join(differences)}")
    restored = []
    for key, leaf in zip(wanted, leaves, strict=True):
        values, expected = stored[key], backend.to_numpy(leaf)
        if np.shape(values) != np.shape(expected):
            raise CheckpointError(f"{path}: {key} has shape {values.shape}")
        if values.dtype.kind != expected.dtype.kind:
            raise CheckpointError(f"{path}: {key} holds {values.dtype}")
        restored.append(int(values) if isinstance(leaf, int) else backend.asarray(values, like=leaf))
    return unflatten(restored)


def _key(root: str, path: str) -> str:
    return f"{root}:{path}"
