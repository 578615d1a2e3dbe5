"""Laws of trees: containers, and the vector space of their leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.backend import Backend
from hypergrad.testing.calculus import value_and_grad
from hypergrad.testing.problems import close, tree, vector


def flattening_round_trips(backend: Backend) -> None:
    """Flattening loses nothing, ``None`` is not a leaf, and paths are written as in Python."""
    x = {"layers": [{"w": vector(backend, 0, 2)}], "none": None}
    leaves, unflatten = backend.flatten(x)
    assert len(leaves) == 1 and unflatten(leaves)["none"] is None
    assert backend.paths(x, "params") == ["params['layers'][0]['w']"]
    assert backend.paths(leaves[0], "params") == ["params"]
    deeper = backend.map(lambda name, part: (name, part), {"a": 1}, {"a": [2, 3]})
    assert deeper == {"a": (1, [2, 3])}


def forms_distinguish_trees(backend: Backend) -> None:
    """Forms are hashable, and equal if structure, shapes and dtypes agree, whatever the values."""
    x, other = tree(backend, 0), tree(backend, 9)
    assert backend.form(x) == backend.form(other) and hash(backend.form(x)) == hash(backend.form(other))
    w = x["w"]
    different = [{**x, "w": w[0]}, {**x, "w": backend.cast(w, "float32")}, {**x, "w": "w"}, {**x, "more": w}]
    assert all(backend.form(x) != backend.form(y) for y in different)
    assert backend.trees.structure(x) == backend.trees.structure(different[0])
    assert backend.trees.structure([w]) != backend.trees.structure([w, w])


def copies_are_independent(backend: Backend) -> None:
    """``copy`` makes new containers that hold the same values."""
    x = tree(backend, 0)
    copied = backend.copy(x)
    close(backend, copied, x, 0.0)
    copied["rest"].clear()
    assert len(x["rest"]) == 2


def trees_are_vectors(backend: Backend) -> None:
    """``inner``, ``axpy``, ``zeros`` and ``ravel`` agree with those of the flat vectors."""
    x, y = tree(backend, 0), tree(backend, 9)
    flat_x, flat_y = (backend.to_numpy(backend.ravel(t)[0]) for t in (x, y))
    np.testing.assert_allclose(backend.to_numpy(backend.inner(x, y)), flat_x @ flat_y, rtol=1e-12)
    total = backend.to_numpy(backend.ravel(backend.axpy(0.5, x, y))[0])
    np.testing.assert_allclose(total, 0.5 * flat_x + flat_y, rtol=1e-12)
    assert not backend.to_numpy(backend.ravel(backend.zeros(x))[0]).any()
    vector_x, unravel = backend.ravel(x)
    close(backend, unravel(vector_x), x, 0.0)


def _in_half_precision(backend: Backend, values: Any) -> list[Any]:
    """Return the values in each half-precision dtype that the framework has."""
    arrays = []
    for dtype in ("float16", "bfloat16"):
        try:
            array = backend.cast(backend.asarray(values), dtype)
        except (TypeError, AttributeError, NotImplementedError):  # the framework lacks this dtype
            continue
        arrays += [array] if backend.is_float(array) else []
    return arrays


def vectors_give_leaves_their_dtype(backend: Backend) -> None:
    """``ravel`` of a tree with several dtypes has its values, and ``unravel`` restores the dtypes."""
    values = np.array([[0.5, -1.25], [2.0, 0.75]])
    double, single = backend.asarray(values), backend.asarray(values.astype("float32"))
    trees: list[Any] = [{"a": single, "b": double}, {"a": double, "b": single}]
    for half in _in_half_precision(backend, values):
        trees += [{"a": half, "b": single}, [double, half], [half, half]]
    for x in trees:
        flat, unravel = backend.ravel(x)
        np.testing.assert_array_equal(backend.to_numpy(flat), np.tile(values.reshape(-1), 2))
        back = unravel(flat)
        assert backend.form(back) == backend.form(x), f"{backend.form(back)} is not {backend.form(x)}"
        close(backend, back, x, 0.0)
        leaves = backend.flatten(unravel(2.0 * flat))[0]
        assert [y.dtype for y in leaves] == [y.dtype for y in backend.flatten(x)[0]]


def sums_keep_dtypes(backend: Backend) -> None:
    """``axpy`` gives each leaf the dtype that it has in y, and ``inner`` adds half precision in float32."""
    values = np.full(4096, 1.0)
    for half in _in_half_precision(backend, values):
        sums = backend.axpy(0.5, [half, half], [half, backend.asarray(values.astype("float32"))])
        assert [x.dtype for x in sums] == [half.dtype, backend.asarray(values.astype("float32")).dtype]
        total = backend.inner([half], [half])
        assert float(backend.to_numpy(total)) == 4096.0 and backend.describe(total).itemsize >= 4


def scalars_are_numbers(backend: Backend) -> None:
    """``number`` reads a scalar in its own precision, or gives ``None`` if a derivative passes through it."""
    for dtype in ("float32", "float64"):
        x = tree(backend, 0, dtype)
        scalar = backend.inner(x, x)
        value = backend.number(scalar)
        assert isinstance(value, np.floating) and str(value.dtype) == dtype
        assert value == backend.to_numpy(scalar) and backend.number(float(value)) == float(value)
    numbers = []

    def f(x: Any) -> Any:
        numbers.append(backend.number(backend.inner(x, x)))
        return backend.inner(x, x)

    value_and_grad(backend, f, tree(backend, 0))
    assert numbers and all(value is None for value in numbers)


TREE_LAWS = (
    flattening_round_trips,
    forms_distinguish_trees,
    copies_are_independent,
    trees_are_vectors,
    vectors_give_leaves_their_dtype,
    sums_keep_dtypes,
    scalars_are_numbers,
)
