"""States in host memory or in a file, for the tapes that keep states."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.problems.step import Inner
from hypergrad.tapes.base import Recording, Shelf, Tape
from hypergrad.tapes.binomial import Binomial
from hypergrad.tapes.states import States
from hypergrad.tapes.trajectory import Trajectory


@final
@dataclass(frozen=True)
class Offload(Tape):
    """Keep the states of another tape away from the device that computes.

    In host memory, torch copies them asynchronously into pinned memory and back, and XLA where it has such a
    memory (there with `States` alone: no single place in it can be written to); where the device is the host
    they stay where they are. In a ``directory`` they lie in one memory-mapped file without a name, which is
    gone as soon as nothing refers to it, whatever happens to the process.

    Args:
        tape: `States` or `Binomial`.
        directory: where there is room for the file; host memory if it is not given.

    Raises:
        UnsupportedOpError: for a derivative of a hypergradient whose states went through a file.
        ArgumentError: for another tape, and when used in JAX with a directory: a compiled program reads no
            file.
    """

    tape: Tape
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tape, States | Binomial):
            raise ArgumentError(f"Offload: tape = {self.tape!r}; States and Binomial keep states")

    @property
    def open_ended(self) -> bool:  # type: ignore[override]
        return self.tape.open_ended

    def record(self, path: Trajectory, z: Inner, hparams: Tree) -> Recording:
        backend, tape = path.backend, self.tape
        assert isinstance(tape, States | Binomial)
        if backend.compiles and self.directory is not None:
            raise ArgumentError("Offload: a compiled program reads no file: leave directory= out")
        if self.directory is not None:
            z, hparams = backend.nondifferentiable((z, hparams), "hg.Offload(directory=…)")
        shelf = _Host(backend) if self.directory is None else _File(backend, Path(self.directory))
        return tape.record(path, z, hparams, shelf)


@dataclass
class _Host(Shelf):
    """Host memory."""

    backend: Backend

    def put(self, z: Inner, place: Any) -> Any:
        return self.backend.memory.to_host(z)

    def take(self, kept: Any) -> Inner:
        found: Inner = self.backend.memory.from_host(kept)
        return found


class _Written(NamedTuple):
    """Where a leaf lies, and what it is to become again."""

    offset: int
    shape: tuple[int, ...]
    dtype: Any
    like: Any


class _File(Shelf):
    """One file, in which each place has its own room."""

    def __init__(self, backend: Backend, directory: Path) -> None:
        self.backend, self.file, self.size = backend, tempfile.TemporaryFile(dir=directory), 0
        weakref.finalize(self, self.file.close)

    def put(self, z: Inner, place: Any) -> Any:
        leaves, unflatten = self.backend.flatten(z)
        arrays = [
            np.ascontiguousarray(self.backend.to_numpy(x)) if self.backend.owns(x) else x for x in leaves
        ]
        self.size = self.size or sum(x.nbytes for x in arrays if isinstance(x, np.ndarray))
        self.file.seek(place * self.size)
        written: list[Any] = []
        for leaf, array in zip(leaves, arrays, strict=True):
            if not isinstance(array, np.ndarray):
                written.append(array)
                continue
            like = self.backend.asarray(np.zeros(0), like=leaf)  # no view, which would hold all of it
            shape = np.shape(leaf)  # ascontiguousarray makes a scalar an array of one
            written.append(_Written(self.file.tell(), shape, array.dtype, like))
            self.file.write(array.data)
        self.file.flush()
        return written, unflatten

    def take(self, kept: Any) -> Inner:
        written, unflatten = kept
        z: Inner = unflatten([self._read(x) if isinstance(x, _Written) else x for x in written])
        return z

    def _read(self, leaf: _Written) -> Any:
        if 0 in leaf.shape:
            return self.backend.asarray(np.zeros(leaf.shape, leaf.dtype), like=leaf.like)
        mapped = np.memmap(self.file, leaf.dtype, "r", leaf.offset, leaf.shape or (1,))
        return self.backend.asarray(mapped.reshape(leaf.shape), like=leaf.like)
