"""The laws that every estimator obeys, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend, vectors
from hypergrad.estimators import HypergradientEstimator
from hypergrad.problems.bilevel import Bilevel
from hypergrad.testing.differences import along, directional, dot, random_like
from hypergrad.testing.problems import close, regression
from hypergrad.updates import as_update_rule

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


def exact_hypergradients_are_derivatives_of_the_training(
    backend: Backend, estimator: HypergradientEstimator
) -> None:
    """An exact estimate is the derivative of C2 after its own training steps, by central differences.

    For estimators that say so by `HypergradientEstimator.is_exact`. Catches an unroll that forgets a step.
    """
    if not estimator.is_exact:
        return
    problem, params, hparams, train, val = regression(backend)
    rule: Any = as_update_rule(getattr(estimator, "update"))  # noqa: B009
    batches = [train | {"y": train["y"] * (1.0 + 0.3 * t)} for t in range(estimator.training_steps)]
    direction = random_like(backend, hparams, 7)

    def value(h: float) -> float:
        lam, theta = along(backend, hparams, direction, h), params
        opt_state = rule.init(backend, theta)
        for t, batch in enumerate(batches):
            loss = problem.loss_on(backend, batch, None)
            value, pullback = backend.pullback(lambda p, loss=loss: loss(p, lam)[0], theta)
            (gradient,) = pullback(backend.xp.ones_like(value))
            theta, opt_state = rule.update(backend, gradient, opt_state, theta, lam, t)
        return float(backend.to_numpy(problem.outer(theta, lam, val)))

    state = estimator.init(problem, params, hparams, backend=backend)
    out = estimator.estimate(problem, state, hparams, batches, val, backend=backend)
    np.testing.assert_allclose(
        dot(backend, out.hypergradient, direction), directional(value), rtol=1e-5, atol=1e-9
    )


def hypergradients_point_uphill(backend: Backend, estimator: HypergradientEstimator) -> None:
    """At the optimum of a ridge regression of one parameter the estimate has the sign of dC2/dλ.

    θ = 1 / (1 + e^λ) minimises ½ (θ − 1)² + ½ e^λ θ², and C2 = ½ (θ − b)². For estimators that do not train,
    or train by steps in proportion to the gradient: others may turn the sign. Catches a term with the wrong
    sign, of approximations, too.
    """
    if estimator.training_steps and not _steps_in_proportion(backend, getattr(estimator, "update", None)):
        return
    for target in (0.0, 3.0):
        problem = Bilevel(
            lambda p, h, b: 0.5 * (p - 1.0) ** 2 + 0.5 * backend.xp.exp(h) * p**2,
            lambda p, h, b, target=target: 0.5 * (p - target) ** 2,
        )
        params, hparams = backend.asarray(np.array(0.5)), backend.asarray(np.array(0.0))
        state = estimator.init(problem, params, hparams, backend=backend)
        out = estimator.estimate(problem, state, hparams, lambda t: None, None, backend=backend)
        slope = (0.5 - target) * -0.25
        assert float(backend.to_numpy(out.hypergradient)) * slope > 0.0


def _steps_in_proportion(backend: Backend, rule: Any) -> bool:
    """Does the first step of a rule double if the gradient doubles?"""
    rule, (params, hparams) = as_update_rule(rule), regression(backend)[1:3]
    gradient = random_like(backend, params, 1)
    steps = [
        vectors.subtract(
            backend,
            rule.update(
                backend,
                vectors.scale(backend, k, gradient),
                rule.init(backend, params),
                params,
                hparams,
                0,
            )[0],
            params,
        )
        for k in (1.0, 2.0)
    ]
    left = vectors.norm(backend, backend.axpy(-2.0, steps[0], steps[1]))
    return float(backend.to_numpy(left)) <= 1e-9 * float(backend.to_numpy(vectors.norm(backend, steps[0])))


def steps_are_counted(backend: Backend, estimator: HypergradientEstimator) -> None:
    """The state after an estimate is `HypergradientEstimator.training_steps` further, and θ has moved."""
    out, params = _estimate(backend, estimator), regression(backend)[1]
    assert int(out.state.step) == estimator.training_steps
    moved = vectors.norm(backend, vectors.subtract(backend, out.state.params, params))
    assert (float(backend.to_numpy(moved)) > 0.0) == (estimator.training_steps > 0)


ESTIMATOR_LAWS: tuple[Law, ...] = (
    results_have_the_form_of_hparams,
    estimates_are_pure,
    hypergradients_are_linear_in_the_validation_loss,
    direct_terms_are_added,
    exact_hypergradients_are_derivatives_of_the_training,
    hypergradients_point_uphill,
    steps_are_counted,
)
