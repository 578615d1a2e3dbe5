"""The laws that every estimator obeys, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend, vectors
from hypergrad.estimators import HypergradientEstimator
from hypergrad.problems.bilevel import Bilevel
from hypergrad.testing.problems import close, regression

Law = Callable[[Backend, HypergradientEstimator], None]


def _estimate(
    backend: Backend, estimator: HypergradientEstimator, dtype: Any = float, problem: Bilevel | None = None
) -> Any:
    given, params, hparams, train, val = regression(backend, dtype)
    problem = problem or given
    state = estimator.init(problem, params, hparams, backend=backend)
    return estimator.estimate(problem, state, hparams, lambda t: train, val, backend=backend)


def results_have_the_form_of_hparams(backend: Backend, estimator: HypergradientEstimator) -> None:
    """Structure, shapes and dtypes of the hypergradient are those of the hyperparameters."""
    for dtype in ("float64", "float32"):
        hparams = regression(backend, dtype)[2]
        out = _estimate(backend, estimator, dtype)
        assert backend.paths(out.hypergradient, "h") == backend.paths(hparams, "h")
        for mine, model in zip(
            backend.flatten(out.hypergradient)[0], backend.flatten(hparams)[0], strict=True
        ):
            assert backend.describe(mine) == backend.describe(model)
        for leaf in backend.flatten(out.state.params)[0]:
            assert backend.describe(leaf).dtype == backend.describe(backend.flatten(hparams)[0][0]).dtype


def estimates_are_pure(backend: Backend, estimator: HypergradientEstimator) -> None:
    """Arguments do not change, and the same arguments give the same estimate."""
    problem, params, hparams, train, val = regression(backend)
    copies = [backend.to_numpy(leaf).copy() for leaf in backend.flatten((params, hparams, train, val))[0]]
    state = estimator.init(problem, params, hparams, backend=backend)
    first, second = (
        estimator.estimate(problem, state, hparams, lambda t: train, val, backend=backend) for _ in range(2)
    )
    close(backend, first.hypergradient, second.hypergradient, 0.0)
    for leaf, copy in zip(backend.flatten((params, hparams, train, val))[0], copies, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(leaf), copy)


def hypergradients_are_linear_in_the_validation_loss(
    backend: Backend, estimator: HypergradientEstimator
) -> None:
    """Three times C2 gives three times the hypergradient."""
    problem = regression(backend)[0]
    thrice = Bilevel(problem.inner, lambda p, h, b: 3.0 * problem.outer(p, h, b))
    one, three = _estimate(backend, estimator), _estimate(backend, estimator, problem=thrice)
    scaled = vectors.scale(backend, 3.0, one.hypergradient)
    size = float(backend.to_numpy(vectors.norm(backend, scaled)))
    error = vectors.norm(backend, vectors.subtract(backend, three.hypergradient, scaled))
    assert float(backend.to_numpy(error)) <= 1e-6 * size


def direct_terms_are_added(backend: Backend, estimator: HypergradientEstimator) -> None:
    """A function of λ added to C2 adds its own gradient."""
    problem, _, hparams, _, _ = regression(backend)
    more = Bilevel(problem.inner, lambda p, h, b: problem.outer(p, h, b) + backend.xp.sum(h["log_l2"] ** 2))
    plain, added = _estimate(backend, estimator), _estimate(backend, estimator, problem=more)
    difference = vectors.subtract(backend, added.hypergradient, plain.hypergradient)
    close(backend, difference["log_l2"], 2.0 * hparams["log_l2"], 1e-9)


ESTIMATOR_LAWS: tuple[Law, ...] = (
    results_have_the_form_of_hparams,
    estimates_are_pure,
    hypergradients_are_linear_in_the_validation_loss,
    direct_terms_are_added,
)
