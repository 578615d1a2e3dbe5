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
from hypergrad.tapes.base import Recording, Storage, Tape
from hypergrad.tapes.binomial import Binomial
from hypergrad.tapes.states import States
from hypergrad.tapes.trajectory import Trajectory


@final
@dataclass(frozen=True)
class Offload(Tape):
    """Keep the states of another tape away from the device that computes.

    By default they go to host memory. torch copies them asynchronously into pinned memory and back, and so
    does XLA where it has such a memory, but only with `States`, because XLA cannot write to a single row of
    it. If the device is the host, they are not copied. With a ``directory`` they go to one memory-mapped file
    without a name, which disappears as soon as nothing refers to it, even if the process crashes.

    Args:
        tape: `States` or `Binomial`.
        directory: where to create the file; ``None`` for host memory.

    Raises:
        UnsupportedOpError: if a hypergradient whose states went through a file is differentiated.
        ArgumentError: for another tape; when used in JAX, with a directory: a compiled program cannot read a
            file.
    """

    tape: Tape
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tape, States | Binomial):
            raise ArgumentError(f"Offload: tape = {self.tape!r}; it must be hg.States or hg.Binomial")

    @property
    def open_ended(self) -> bool:  # type: ignore[override]
        return self.tape.open_ended

    def record(self, path: Trajectory, z: Inner, hparams: Tree) -> Recording:
        backend, tape = path.backend, self.tape
        assert isinstance(tape, States | Binomial)
        if backend.compiles and self.directory is not None:
            raise ArgumentError("Offload: a compiled program cannot read a file: leave out directory=")
        if self.directory is not None:
            z, hparams = backend.nondifferentiable((z, hparams), "hg.Offload(directory=…)")
        storage = _Host(backend) if self.directory is None else _File(backend, Path(self.directory))
        return tape.record(path, z, hparams, storage)


@dataclass
class _Host(Storage):
    """Host memory."""

    backend: Backend

    def put(self, z: Inner, place: Any) -> Any:
        return self.backend.memory.to_host(z)

    def take(self, handle: Any) -> Inner:
        z: Inner = self.backend.memory.from_host(handle)
        return z


class _Written(NamedTuple):
    """Where a leaf lies in the file, and how to restore it."""

    offset: int
    shape: tuple[int, ...]
    dtype: Any
    like: Any


class _File(Storage):
    """One file, with a region of equal size for each state."""

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
            # An empty array of its own: a view would keep the whole leaf alive.
            like = self.backend.asarray(np.zeros(0), like=leaf)
            shape = np.shape(leaf)  # ascontiguousarray turns a scalar into an array of one element
            written.append(_Written(self.file.tell(), shape, array.dtype, like))
            self.file.write(array.data)
        self.file.flush()
        return written, unflatten

    def take(self, handle: Any) -> Inner:
        written, unflatten = handle
        z: Inner = unflatten([self._read(x) if isinstance(x, _Written) else x for x in written])
        return z

    def _read(self, leaf: _Written) -> Any:
        if 0 in leaf.shape:
            return self.backend.asarray(np.zeros(leaf.shape, leaf.dtype), like=leaf.like)
        mapped = np.memmap(self.file, leaf.dtype, "r", leaf.offset, leaf.shape or (1,))
        return self.backend.asarray(mapped.reshape(leaf.shape), like=leaf.like)
