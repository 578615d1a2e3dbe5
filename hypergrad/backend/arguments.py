"""Checks of the arguments of estimators. They run before any work is done, and their errors name the leaf.

Only shapes and dtypes are read, never values, so the checks cost microseconds, wait for no device and work
while a compiler traces. Trees of a form that has passed once are not checked leaf by leaf again.
"""

from __future__ import annotations

from collections.abc import Hashable

from hypergrad.backend.protocol import Backend
from hypergrad.backend.types import Array, Leaf, Tree
from hypergrad.errors import ArgumentError, LeafTypeError, UnsupportedLeafError

_MAX_PASSED = 1024
_passed: set[Hashable] = set()
"""Keys of checks that have passed, at most `_MAX_PASSED`. Failures are not stored: threads may share it."""


def _has_passed(key: Hashable) -> bool:
    try:
        return key in _passed
    except TypeError:  # the caller's own container, whose metadata cannot be hashed
        return False


def _record_pass(key: Hashable) -> None:
    if len(_passed) >= _MAX_PASSED:
        _passed.clear()
    try:
        _passed.add(key)
    except TypeError:
        pass


def check_variables(backend: Backend, **trees: Tree) -> None:
    """Check params and hparams, with respect to which derivatives are taken; keywords name them in errors.

    Raises:
        ArgumentError: if a tree has no leaves, or none that is not fixed; for a fixed leaf of hparams.
        LeafTypeError: for integers, booleans, foreign arrays, and mixed devices.
        UnsupportedLeafError: for complex leaves.
    """
    key = "variables", type(backend), backend.form(trees)
    if _has_passed(key):
        return
    first: tuple[str, str] | None = None
    for root, tree in trees.items():
        leaves, paths = backend.flatten(tree)[0], backend.paths(tree, root)
        if not leaves:
            raise ArgumentError(f"{root} is an empty tree: there is nothing to take derivatives for")
        fixed = [path for path, leaf in zip(paths, leaves, strict=True) if backend.is_fixed(leaf)]
        if fixed and (root != "params" or len(fixed) == len(leaves)):
            raise ArgumentError(
                f"{fixed[0]} is a parameter with requires_grad=False, which stays fixed: pass its values, "
                "p.detach(), to take derivatives by it"
            )
        for path, leaf in zip(paths, leaves, strict=True):
            device = _check_float(backend, path, leaf)
            if first is None:
                first = path, device
            if device != first[1]:
                raise LeafTypeError(
                    f"{path} has device {device} and {first[0]} has device {first[1]}: bring all leaves to "
                    "one device"
                )
    _record_pass(key)


def _check_float(backend: Backend, path: str, leaf: Array) -> str:
    """Check the type of a leaf, and return its device."""
    if not backend.owns(leaf):
        raise LeafTypeError(
            f"{path} is a {type(leaf).__module__}.{type(leaf).__qualname__}, not an array of "
            f"{backend.name}: convert it, or leave it out of the tree"
        )
    kind, dtype, _, _, device = backend.describe(leaf)
    if kind == "complex":
        raise UnsupportedLeafError(f"{path} is complex ({dtype}): split it into real and imaginary parts")
    if kind in ("int", "bool"):
        raise LeafTypeError(
            f"{path} has dtype {dtype}, which has no derivatives: relax it to a real number "
            "(a soft mask for a boolean, a width or temperature for a count), or pass it in the batch"
        )
    if kind != "float":
        raise LeafTypeError(f"{path} has dtype {dtype}, which is not a floating-point number")
    return device


def _widest(backend: Backend, params: Tree) -> Leaf:
    infos = [backend.describe(leaf) for leaf in backend.flatten(params)[0] if backend.owns(leaf)]
    return max(infos, key=lambda info: info.itemsize)


def check_batch(backend: Backend, root: str, batch: Tree, params: Tree) -> None:
    """Refuse a batch whose floats are wider than the parameters: the loss would be upcast silently.

    Raises:
        LeafTypeError: naming the leaf.
    """
    key = "batch", type(backend), backend.form((batch, params))
    if _has_passed(key):
        return
    reference = _widest(backend, params)
    for path, leaf in zip(backend.paths(batch, root), backend.flatten(batch)[0], strict=True):
        if not backend.owns(leaf) or isinstance(leaf, bool | int | float):
            continue
        info = backend.describe(leaf)
        if info.kind == "float" and info.itemsize > reference.itemsize and info.shape != ():
            raise LeafTypeError(
                f"{path} has dtype {info.dtype} and the parameters have {reference.dtype}: the loss "
                f"would be computed in the wider type silently; convert {path} to {reference.dtype}"
            )
    _record_pass(key)


def check_loss(backend: Backend, name: str, value: Array, params: Tree = None, hparams: Tree = None) -> None:
    """Check that a loss returned one real number, not wider than the parameters if they are given.

    Models in half precision may take their loss in float32. Hyperparameters may be wider if the loss converts
    them.

    Raises:
        ArgumentError: if it returned anything else; the message has the shape.
        LeafTypeError: if a hyperparameter, a constant or a batch made it wider.
    """
    key = "loss", type(backend), backend.form((value, params))
    if _has_passed(key):
        return
    if not backend.owns(value):
        raise ArgumentError(f"{name} returned {type(value).__name__}: a loss returns a scalar array")
    info = backend.describe(value)
    if info.shape != ():
        raise ArgumentError(
            f"{name} returned shape {info.shape}, and a loss has shape (): take the mean or the sum"
        )
    if info.kind != "float":
        raise ArgumentError(f"{name} returned dtype {info.dtype}: a loss is a floating-point number")
    reference = _widest(backend, params) if backend.flatten(params)[0] else info
    if info.itemsize > max(reference.itemsize, 4):
        leaves = zip(backend.paths(hparams, "hparams"), backend.flatten(hparams)[0], strict=True)
        wide = [
            path
            for path, leaf in leaves
            if backend.owns(leaf) and backend.describe(leaf).itemsize > reference.itemsize
        ]
        causes = f"{', '.join(wide)} has" if wide else "a constant or a batch inside the loss has"
        raise LeafTypeError(
            f"{name} returned {info.dtype} for parameters of {reference.dtype}: {causes} a wider dtype, "
            "which upcasts silently; convert it inside the loss"
        )
    _record_pass(key)


def check_same(backend: Backend, name: str, given: Tree, root: str, expected: Tree) -> None:
    """Check that a tree has the structure, shapes and dtypes of another.

    Raises:
        ArgumentError: with both structures or shapes, where they differ.
        LeafTypeError: with both dtypes, where they differ.
    """
    if given is expected or backend.form(given) == backend.form(expected):
        return
    paths, expected_paths = backend.paths(given, root), backend.paths(expected, root)
    if paths != expected_paths:
        extra, missing = set(paths) - set(expected_paths), set(expected_paths) - set(paths)
        raise ArgumentError(
            f"{name}: {root} has the wrong structure: it has {', '.join(sorted(extra)) or 'no leaf'} "
            f"where {', '.join(sorted(missing)) or 'no leaf'} should be"
        )
    leaves = zip(paths, backend.flatten(given)[0], backend.flatten(expected)[0], strict=True)
    for path, leaf, model in leaves:
        mine, other = backend.describe(leaf), backend.describe(model)
        if mine.shape != other.shape:
            raise ArgumentError(f"{name}: {path} has shape {mine.shape}, expected {other.shape}")
        if mine.dtype != other.dtype:
            raise LeafTypeError(
                f"{name}: {path} has dtype {mine.dtype}, expected {other.dtype}: something wider or "
                "narrower was mixed in, and would convert it silently"
            )


def is_number(value: object) -> bool:
    """Return whether this is a Python number and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
