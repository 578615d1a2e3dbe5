"""Files of named arrays. A failed write leaves the old file intact, and reading runs no code from a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import CheckpointError


def write_arrays(path: str | Path, arrays: dict[str, Any]) -> None:
    """Write an ``.npz`` file beside the old one, flush it to disk, and rename it to replace the old one.

    Raises:
        OSError: if the file cannot be written; an older file is then unchanged.
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
        CheckpointError: if the file is damaged, or `write_arrays` did not write it.
        FileNotFoundError: if it does not exist.
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
