"""The laws that every space obeys, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend
from hypergrad.testing.differences import directional
from hypergrad.testing.problems import close, vector
from hypergrad.tuning import Space

_FAR = (0.0, 1.0, 30.0, 1e3, 1e6)
"""Distances in free coordinates to which updates may lead."""


def _free(backend: Backend, space: Space, dtype: Any = float) -> Any:
    """Return free coordinates that `Space.project` allows."""
    return space.project(backend.xp, vector(backend, 1, 2, 3, dtype=dtype))


def free_coordinates_round_trip(backend: Backend, space: Space) -> None:
    """``constrain`` undoes ``unconstrain``: λ(u(λ)) = λ."""
    xp = backend.xp
    lam = space.constrain(xp, _free(backend, space))
    close(backend, space.constrain(xp, space.unconstrain(xp, lam)), lam, 1e-10)


def projected_coordinates_are_inside(backend: Backend, space: Space) -> None:
    """However far an update leads, λ is inside its space after the projection, in float32, too."""
    xp = backend.xp
    for dtype in ("float64", "float32"):
        for far in _FAR:
            u = space.project(xp, far * vector(backend, 2, 2, 3, dtype=dtype))
            lam = space.constrain(xp, u)
            assert np.all(np.isfinite(backend.to_numpy(lam)))
            assert np.all(backend.to_numpy(space.contains(xp, lam)))


def projections_keep_what_is_allowed(backend: Backend, space: Space) -> None:
    """A projection changes nothing the second time."""
    for far in _FAR:
        once = space.project(backend.xp, far * vector(backend, 3, 2, 3))
        close(backend, space.project(backend.xp, once), once, 0.0)


def coordinates_keep_shape_and_dtype(backend: Backend, space: Space) -> None:
    """Each of the maps returns an array of the shape and dtype that it is given."""
    xp = backend.xp
    for dtype in ("float64", "float32"):
        u = _free(backend, space, dtype)
        lam = space.constrain(xp, u)
        for made in (u, lam, space.unconstrain(xp, lam), space.project(xp, u)):
            assert backend.describe(made)[:3] == backend.describe(vector(backend, 1, 2, 3, dtype=dtype))[:3]
        assert backend.describe(space.contains(xp, lam)).kind == "bool"


def what_is_no_number_is_outside(backend: Backend, space: Space) -> None:
    """NaN and infinities are in no space."""
    for value in (np.nan, np.inf, -np.inf):
        lam = backend.asarray(np.full((2, 3), value))
        with np.errstate(invalid="ignore"):
            assert not np.any(backend.to_numpy(space.contains(backend.xp, lam)))


def derivatives_of_the_map_are_right(backend: Backend, space: Space) -> None:
    """∂λ/∂u agrees with central differences."""
    xp, u = backend.xp, _free(backend, space)
    weights, direction = (np.random.default_rng(seed).normal(size=(2, 3)) for seed in (5, 6))
    inside = backend.to_numpy(space.project(xp, backend.asarray(backend.to_numpy(u) - 0.01 * direction)))
    if not np.allclose(inside, backend.to_numpy(u) - 0.01 * direction):
        u = backend.asarray(np.abs(backend.to_numpy(u)) + 0.1)  # off an end of the domain
    _, pullback = backend.pullback(lambda u: space.constrain(xp, u), u)
    (gradient,) = pullback(backend.asarray(weights))

    def value(h: float) -> float:
        lam = space.constrain(xp, backend.asarray(backend.to_numpy(u) + h * direction))
        return float(np.sum(weights * backend.to_numpy(lam)))

    found = float(np.sum(backend.to_numpy(gradient) * direction))
    np.testing.assert_allclose(found, directional(value), rtol=1e-6, atol=1e-9)


SPACE_LAWS: tuple[Callable[[Backend, Space], None], ...] = (
    free_coordinates_round_trip,
    projected_coordinates_are_inside,
    projections_keep_what_is_allowed,
    coordinates_keep_shape_and_dtype,
    what_is_no_number_is_outside,
    derivatives_of_the_map_are_right,
)
