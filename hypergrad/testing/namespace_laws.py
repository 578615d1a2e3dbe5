"""Laws of ``xp``: a backend has every function that this library uses, under its array-API name."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from hypergrad.backend import Backend
from hypergrad.backend.protocol import NAMESPACE
from hypergrad.testing.calculus import check_slope


class Example(NamedTuple):
    """A use of a function of ``xp``: ``call(xp, x, p)``, where all of p is positive.

    NumPy has the same names, so the same call with ``numpy`` for ``xp`` gives the values to expect.
    """

    call: Callable[[Any, Any, Any], Any]
    differentiable: bool = False


def _eigh(xp: Any, x: Any, p: Any) -> Any:
    values, q = xp.linalg.eigh(x @ x.T)
    return values, (q * values) @ q.T


def _svd(xp: Any, x: Any, p: Any) -> Any:
    (u, s, vt), (_, square, _) = xp.linalg.svd(x, full_matrices=False), xp.linalg.svd(x @ x.T)
    return s, square, (u * s) @ vt


def _finfo(xp: Any, x: Any, p: Any) -> Any:
    info = xp.finfo(x.dtype)
    return tuple(np.asarray(float(n)) for n in (info.eps, info.max, info.tiny))


EXAMPLES = {
    "abs": Example(lambda xp, x, p: xp.abs(x), True),
    "all": Example(lambda xp, x, p: (xp.all(x > 0), xp.all(p > 0))),
    "any": Example(lambda xp, x, p: (xp.any(x > 0), xp.any(p < 0))),
    "concatenate": Example(lambda xp, x, p: xp.concatenate([x[0], p[1], p[0]]), True),
    "exp": Example(lambda xp, x, p: xp.exp(x), True),
    "expm1": Example(lambda xp, x, p: xp.expm1(1e-6 * x), True),
    "finfo": Example(_finfo),
    "isfinite": Example(lambda xp, x, p: xp.isfinite(xp.where(x > 0, float("inf"), x))),
    "linalg.eigh": Example(_eigh),
    "linalg.svd": Example(_svd),
    "log": Example(lambda xp, x, p: xp.log(p), True),
    "log1p": Example(lambda xp, x, p: xp.log1p(1e-6 * p), True),
    "max": Example(lambda xp, x, p: (xp.max(x), xp.max(x, axis=-1, keepdims=True)), True),
    "maximum": Example(lambda xp, x, p: xp.maximum(x, p), True),
    "mean": Example(lambda xp, x, p: (xp.mean(x), xp.mean(x, axis=0)), True),
    "min": Example(lambda xp, x, p: xp.min(x * p), True),
    "minimum": Example(lambda xp, x, p: xp.minimum(x, p), True),
    "ones_like": Example(lambda xp, x, p: xp.ones_like(x)),
    "reshape": Example(lambda xp, x, p: (xp.reshape(x, (-1,)), xp.reshape(p, (3, 2))), True),
    "round": Example(lambda xp, x, p: xp.round(10.0 * x + 0.2)),
    "sqrt": Example(lambda xp, x, p: xp.sqrt(p), True),
    "stack": Example(lambda xp, x, p: xp.stack([x, p, x]), True),
    "sum": Example(
        lambda xp, x, p: (xp.sum(x), xp.sum(x * p, axis=0), xp.sum(x, axis=-1, keepdims=True)), True
    ),
    "tanh": Example(lambda xp, x, p: xp.tanh(x), True),
    "where": Example(
        lambda xp, x, p: (xp.where(x > 0, x, p), xp.where(x > 0, x, 0.0), xp.where(x > 0, 1.0, 0.0 * x)), True
    ),
    "zeros_like": Example(lambda xp, x, p: xp.zeros_like(x)),
}
"""At least one example for every name of `NAMESPACE`."""

_X = np.array([[0.3, -1.2, 2.1], [0.7, 1.9, -0.4]])
_P = np.array([[0.4, 1.5, 2.2], [0.9, 0.35, 3.1]])


def namespaces_are_complete(backend: Backend) -> None:
    """``xp`` holds every function of `NAMESPACE`."""
    missing = []
    for name in NAMESPACE:
        try:
            attrgetter(name)(backend.xp)
        except AttributeError:
            missing.append(name)
    assert not missing, f"xp of {backend.name} lacks {', '.join(missing)}"


def functions_do_what_their_names_say(backend: Backend) -> None:
    """Each function of ``xp`` gives the values that NumPy's function of the same name gives."""
    x, p = backend.asarray(_X), backend.asarray(_P)
    for name in NAMESPACE:
        results = backend.flatten(EXAMPLES[name].call(backend.xp, x, p))[0]
        expected = backend.flatten(EXAMPLES[name].call(np, _X, _P))[0]
        assert len(results) == len(expected), f"xp.{name} gives {len(results)} arrays, not {len(expected)}"
        for mine, other in zip(results, expected, strict=True):
            values = np.asarray(backend.to_numpy(mine))
            assert values.dtype.kind == other.dtype.kind, f"xp.{name} gives {values.dtype}, not {other.dtype}"
            np.testing.assert_allclose(values, other, rtol=1e-12, atol=1e-12, err_msg=f"xp.{name}")


def functions_have_derivatives(backend: Backend) -> None:
    """The derivatives of the functions of ``xp`` agree with central differences of NumPy's."""
    for name in NAMESPACE:
        if EXAMPLES[name].differentiable:
            check_slope(backend, f"xp.{name}", EXAMPLES[name].call, _X, _P)


NAMESPACE_LAWS = (namespaces_are_complete, functions_do_what_their_names_say, functions_have_derivatives)
