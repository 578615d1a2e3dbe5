"""The registry of backends, and the search for the backend that owns the arrays of a tree."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from hypergrad.backend.protocol import Backend
from hypergrad.backend.types import Tree
from hypergrad.errors import ArgumentError, BackendError, BackendWarning, LeafTypeError, warn

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


GROUP = "hypergrad.backends"


class Listing(NamedTuple):
    """A registered backend: whether its framework is installed, and the command that installs it."""

    name: str
    installed: bool
    install: str
    distribution: str


def registered() -> dict[str, EntryPoint]:
    """Return the entry point of each backend that is installed, by the name of its framework."""
    from importlib.metadata import entry_points  # slow to import, and not needed before now

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def available() -> list[Listing]:
    """List every registered backend, whether its framework is installed, and how to install it."""
    rows = []
    for name, entry in sorted(registered().items()):
        distribution = _distribution(entry)
        ours = distribution == "hypergradients"
        requirement = f"'{distribution}[{name}]'" if ours else f"{distribution} {name}"
        install = f"python -m pip install {requirement}"
        rows.append(Listing(name, _is_installed(name), install, distribution))
    return rows


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "hypergradients"


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # it has been imported by other means, and says nothing of where it lies
        return name in sys.modules


@cache
def get_backend(name: str) -> Backend:
    """Load a backend by the name of its framework.

    Raises:
        BackendError: if no such backend is registered, its framework is not installed, or it fails to load.
    """
    entries = registered()
    if name not in entries:
        names = ", ".join(sorted(entries)) or "none: is hypergradients installed?"
        raise BackendError(f"no backend {name!r} is registered; available: {names}")
    if not _is_installed(name):
        hint = next(row.install for row in available() if row.name == name)
        raise BackendError(f"the backend {name!r} needs its framework: {hint}")
    try:
        backend: Backend = entries[name].load()()
    except Exception as error:
        where = _distribution(entries[name])
        raise BackendError(
            f"the backend {name!r} of the package {where} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return backend


def find_backend(*trees: Tree, backend: Backend | str | None = None) -> Backend:
    """Return ``backend``, a backend or its name, or else the one that owns the arrays of the trees.

    Arrays exist only if their framework has been imported. So only backends of imported frameworks are tried,
    and no framework is imported here.

    Raises:
        ArgumentError: if the trees have no leaves.
        LeafTypeError: if no backend owns the leaves, or if they belong to two frameworks.
        BackendError: if ``backend`` is a name that is not registered or not installed.
    """
    if isinstance(backend, str):
        return get_backend(backend)
    if backend is not None:
        return backend
    owners = [candidate for candidate in loaded() if _owns_any(candidate, trees)]
    if len(owners) > 1:  # a number of Python belongs to whatever stands beside it
        owners = [candidate for candidate in owners if _owns_any(candidate, trees, numbers=False)] or owners
    if len(owners) == 1:
        return owners[0]
    if owners:
        found = " and ".join(f"{_first_path(owner, trees)} an array of {owner.name}" for owner in owners)
        raise LeafTypeError(
            f"{found}: no derivative passes from one framework to another, so convert all leaves of params "
            "and hparams to one of them"
        )
    leaves = [leaf for tree in trees for leaf in get_backend("numpy").flatten(tree)[0]]
    if not leaves:
        raise ArgumentError("params and hparams hold no arrays: there is nothing to differentiate")
    kinds = ", ".join(sorted({f"{type(leaf).__module__}.{type(leaf).__qualname__}" for leaf in leaves}))
    names = ", ".join(candidate.name for candidate in loaded())
    raise LeafTypeError(
        f"no loaded backend ({names}) owns leaves of type {kinds}: pass arrays of one of these "
        "frameworks, or the backend itself as backend="
    )


def loaded() -> list[Backend]:
    """Return the backends whose frameworks have been imported.

    Warns:
        BackendWarning: once, for one that cannot be loaded. It is left out.
    """
    backends = [_backend_or_none(name) for name in _registered_names() if name in sys.modules]
    return [backend for backend in backends if backend is not None]


@cache
def _backend_or_none(name: str) -> Backend | None:
    try:
        return get_backend(name)
    except BackendError as error:
        warn(str(error), BackendWarning)
        return None


@cache
def _registered_names() -> tuple[str, ...]:
    return tuple(sorted(registered()))


def _owns_any(backend: Backend, trees: tuple[Tree, ...], numbers: bool = True) -> bool:
    leaves = (leaf for tree in trees for leaf in backend.flatten(tree)[0])
    return any(
        backend.owns(leaf) for leaf in leaves if numbers or type(leaf) not in (bool, int, float, complex)
    )


def _first_path(backend: Backend, trees: tuple[Tree, ...]) -> str:
    """Return the path of the first array of a backend in params and hparams, with a verb."""
    roots = ("params", "hparams") if len(trees) == 2 else ("the argument",) * len(trees)
    for root, tree in zip(roots, trees, strict=True):
        leaves = zip(
            get_backend("numpy").paths(tree, root), get_backend("numpy").flatten(tree)[0], strict=True
        )
        for path, leaf in leaves:
            if backend.owns(leaf) and not isinstance(leaf, bool | int | float):
                return f"{path} is"
    return "among the arguments is"
