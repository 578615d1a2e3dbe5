"""The laws that every backend obeys."""

from __future__ import annotations

from collections.abc import Callable

from hypergrad.backend import Backend
from hypergrad.testing.array_laws import ARRAY_LAWS
from hypergrad.testing.calculus_laws import CALCULUS_LAWS
from hypergrad.testing.loop_laws import LOOP_LAWS
from hypergrad.testing.namespace_laws import NAMESPACE_LAWS
from hypergrad.testing.resource_laws import RESOURCE_LAWS
from hypergrad.testing.tree_laws import TREE_LAWS

BACKEND_LAWS: tuple[Callable[[Backend], None], ...] = (
    *ARRAY_LAWS,
    *NAMESPACE_LAWS,
    *TREE_LAWS,
    *CALCULUS_LAWS,
    *LOOP_LAWS,
    *RESOURCE_LAWS,
)
