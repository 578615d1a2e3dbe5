"""The generators of a framework, read and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hypergrad.backend.protocol import Backend


@contextmanager
def undo_draws(backend: Backend) -> Iterator[None]:
    """Put the framework's generator back as it was if the block fails."""
    found = backend.generator()
    try:
        yield
    except BaseException:
        backend.restore(found)
        raise
