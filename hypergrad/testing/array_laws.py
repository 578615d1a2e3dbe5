"""Laws of arrays: conversion to and from NumPy and Python, dtypes, and operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend, find_backend, registered
from hypergrad.testing.calculus import check_slope
from hypergrad.testing.problems import vector


def is_a_backend(backend: Backend) -> None:
    """It is a `Backend`, compares by value, and is found from its own arrays if it is registered."""
    assert isinstance(backend, Backend) and backend.name
    assert backend == type(backend)() and hash(backend) == hash(type(backend)())
    assert find_backend(backend=backend) is backend
    if backend.name in registered():
        assert find_backend({"x": [vector(backend, 0, 2), None]}).name == backend.name


def values_come_back(backend: Backend) -> None:
    """NumPy values converted there and back have the same shape and dtype, and ``describe`` is right."""
    for dtype, kind in (("float64", "float"), ("float32", "float"), ("int64", "int"), ("bool", "bool")):
        values = np.array([[1, 0, 1]], dtype)
        array = backend.asarray(values)
        info = backend.describe(array)
        assert backend.owns(array) and backend.readable(array)
        assert backend.is_float(array) == (kind == "float")
        assert (info.kind, info.shape, info.nbytes) == (kind, (1, 3), values.nbytes)
        np.testing.assert_array_equal(backend.to_numpy(array), values)
    like = backend.asarray(np.zeros(2, "float32"))
    assert backend.describe(backend.asarray(np.ones(3), like=like)).dtype == backend.describe(like).dtype


def foreign_objects_are_not_owned(backend: Backend) -> None:
    """A string, ``None`` and an object of no framework are not arrays."""
    assert not any(backend.owns(x) for x in ("1.0", None, object()))


def dtypes_can_be_changed(backend: Backend) -> None:
    """``cast`` takes the dtype's NumPy name and rounds towards zero."""
    integers = backend.cast(backend.asarray(np.array([1.0, -2.0, 3.5])), "int32")
    assert backend.describe(integers).dtype == "int32" and backend.to_numpy(integers).tolist() == [1, -2, 3]
    narrow = backend.cast(backend.asarray(np.array([0.1])), "float32")
    assert backend.describe(narrow).dtype == "float32"
    np.testing.assert_array_equal(backend.to_numpy(narrow), np.array([0.1], "float32"))


_X = np.array([[0.3, -1.2, 2.1], [0.7, 1.9, -0.4]])
_Y = np.array([[0.4, 1.5, 2.2], [0.9, 0.3, 3.1]])
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "x + y": lambda x, y: x + y,
    "1.0 - x": lambda x, y: 1.0 - x,
    "2.0 * x - y": lambda x, y: 2.0 * x - y,
    "x * y": lambda x, y: x * y,
    "x / y": lambda x, y: x / y,
    "1.0 / y": lambda x, y: 1.0 / y,
    "-x": lambda x, y: -x,
    "x ** 2": lambda x, y: x**2,
    "x @ y.T": lambda x, y: x @ y.T,
    "x @ y[0]": lambda x, y: x @ y[0],
    "x[1]": lambda x, y: x[1],
    "x[0][1:3]": lambda x, y: x[0][1:3],
    "x[:, 1:]": lambda x, y: x[:, 1:],
    "x[0] + y": lambda x, y: x[0] + y,
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "x < y": lambda x, y: x < y,
    "x <= 0": lambda x, y: x <= 0,
    "x > y": lambda x, y: x > y,
    "x >= 0": lambda x, y: x >= 0,
    "x == x": lambda x, y: x == x,
    "x != y": lambda x, y: x != y,
    "(x > 0) & (y > 1)": lambda x, y: (x > 0) & (y > 1),
    "(x > 0) | (y > 1)": lambda x, y: (x > 0) | (y > 1),
    "True & (x > 0)": lambda x, y: True & (x > 0),
    "False | (x > 0)": lambda x, y: False | (x > 0),
    "~(x > 0)": lambda x, y: ~(x > 0),
}
_ON_INTEGERS: dict[str, Callable[[Any], Any]] = {
    "n // 2": lambda n: n // 2,
    "n % 2": lambda n: n % 2,
    "n << 3": lambda n: n << 3,
    "n >> 1": lambda n: n >> 1,
    "n & 1": lambda n: n & 1,
    "n + 1": lambda n: n + 1,
}


def arrays_have_operators(backend: Backend) -> None:
    """Arithmetic, comparisons, indices and integer operations give the values that NumPy gives."""
    n = np.array([1, -2, 3], "int32")
    floats, integers = (backend.asarray(_X), backend.asarray(_Y)), backend.asarray(n)
    for name, operation in (_ARITHMETIC | _COMPARISONS).items():
        result, expected = backend.to_numpy(operation(*floats)), operation(_X, _Y)
        assert result.dtype == expected.dtype, f"{name} is {result.dtype}, and {expected.dtype} in NumPy"
        np.testing.assert_allclose(result, expected, rtol=1e-12, err_msg=name)
    for name, of_integers in _ON_INTEGERS.items():
        np.testing.assert_array_equal(backend.to_numpy(of_integers(integers)), of_integers(n), err_msg=name)


def operators_have_derivatives(backend: Backend) -> None:
    """The derivatives of arithmetic and indices agree with central differences of NumPy's."""
    for name, operation in _ARITHMETIC.items():
        check_slope(backend, name, lambda xp, x, y, operation=operation: operation(x, y), _X, _Y)


def operators_keep_float32(backend: Backend) -> None:
    """Arithmetic with a Python number keeps float32."""
    x = backend.asarray(_Y.astype("float32"))
    for result in (2.0 * x, x + 1, 1.0 / x, x**2, -x, x / 3, backend.xp.where(x > 1, x, 0.0)):
        assert backend.describe(result).dtype == "float32"


def arrays_convert_to_python(backend: Backend) -> None:
    """A 0-d array has ``float()``, ``int()`` and ``bool()``; every array has ``.shape`` and ``.dtype``."""
    x = vector(backend, 0, 3, 2)
    assert tuple(x.shape) == (3, 2) and x.dtype == vector(backend, 1, 4).dtype
    half, three = backend.asarray(np.array(0.5)), backend.asarray(np.array(3))
    assert float(half) == 0.5 and int(three) == 3 and bool(three > 2) and not bool(half > 2)


ARRAY_LAWS = (
    is_a_backend,
    values_come_back,
    foreign_objects_are_not_owned,
    dtypes_can_be_changed,
    arrays_have_operators,
    operators_have_derivatives,
    operators_keep_float32,
    arrays_convert_to_python,
)
