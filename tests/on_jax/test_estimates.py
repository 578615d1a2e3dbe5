"""JAX: estimates are pure functions, for ``jit``, ``vmap`` and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypergrad_jax import Optax

import hypergrad as hg
from hypergrad import errors
from hypergrad.backend import get_backend
from hypergrad.testing.problems import regression

JAX, NUMPY = get_backend("jax"), get_backend("numpy")
ANYWHERE = {"checks": hg.Checks(away="ignore")}
ESTIMATORS = [
    hg.Greedy(hg.SGD(0.1)),
    hg.Greedy(hg.Adam(0.1), response="gradient", lookahead=False),
    hg.Greedy(hg.Adam(0.1), products=hg.FiniteDifference()),
    hg.Greedy(hg.ClipNorm(hg.SGD(0.1, momentum=0.5, dampening=0.1), 0.1)),
    hg.Unrolled(hg.SGD(0.02, momentum=0.9, nesterov=True), 4),
    hg.Unrolled(hg.AdamW(0.02, amsgrad=True), 4, tape=hg.States()),
    hg.Unrolled(hg.RMSprop(0.02, momentum=0.5, centered=True), 4, truncate=2),
    hg.Unrolled(hg.Adagrad(0.1, lr_decay=0.1), 4, tape=hg.States()),
    hg.Implicit(hg.CG(), **ANYWHERE),
    hg.Implicit(hg.Direct(), **ANYWHERE),
    hg.Implicit(hg.Neumann(5), **ANYWHERE),
    hg.Implicit(hg.Identity(0.1), **ANYWHERE),
]


def program(estimator, problem):
    return jax.jit(lambda state, h, train, val: estimator.estimate(problem, state, h, lambda t: train, val))


CASES = [
    (estimator, dtype, tolerance)
    for estimator in ESTIMATORS
    for dtype, tolerance in [("float64", 1e-10), ("float32", 1e-5)]
    # A finite difference in float32 has three digits.
    if dtype == "float64" or not isinstance(getattr(estimator, "products", None), hg.FiniteDifference)
]


@pytest.mark.parametrize("estimator, dtype, tolerance", CASES, ids=repr)
def test_compiled_estimates_are_those_of_numpy(estimator, dtype, tolerance):
    results = []
    for backend in (JAX, NUMPY):
        problem, params, hparams, train, val = regression(backend, dtype if backend is JAX else float)
        state = estimator.init(problem, params, hparams)
        if backend is JAX:
            out = estimator.check(program(estimator, problem)(state, hparams, train, val))
        else:
            out = estimator.estimate(problem, state, hparams, lambda t, train=train: train, val)
        leaves = backend.flatten((out.hypergradient, out.state.params))[0]
        results.append(np.concatenate([np.ravel(backend.to_numpy(leaf)) for leaf in leaves]))
    mine, expected = results
    assert mine.dtype == dtype
    assert np.linalg.norm(mine - expected) <= tolerance * (1 + np.linalg.norm(expected))


def test_one_compilation_serves_all_steps_and_values():
    problem, params, hparams, train, val = regression(JAX)
    estimator, traced = hg.Greedy(hg.Adam(0.1)), []

    def step(state, hparams):
        traced.append(1)
        return estimator.estimate(problem, state, hparams, train, val).state

    run, state = jax.jit(step), estimator.init(problem, params, hparams)._replace(step=jnp.asarray(0))
    for k in range(5):
        state = run(state, jax.tree_util.tree_map(lambda x, k=k: x + 0.1 * k, hparams))
    assert len(traced) == 1 and int(state.step) == 5


def test_a_long_unroll_is_no_longer_a_program():
    problem, params, hparams, train, val = regression(JAX)

    def size(steps):
        estimator = hg.Unrolled(hg.SGD(0.01), steps, tape=hg.States())
        state = estimator.init(problem, params, hparams)
        return program(estimator, problem).lower(state, hparams, train, val).as_text().count("\n")

    assert size(1000) == size(10)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_many_starts_in_one_program(estimator):
    problem, params, hparams, train, val = regression(JAX)
    state = estimator.init(problem, params, hparams)

    @jax.jit
    def one(hparams):
        out = estimator.estimate(problem, state, hparams, lambda t: train, val)
        return out.hypergradient, estimator.sound(out)

    starts = {"log_l2": jnp.linspace(-2.0, 1.0, 32).reshape(16, 2), "tilt": jnp.linspace(-1.0, 1.0, 16)}
    together, sound = jax.vmap(one)(starts)
    for k in range(0, 16, 5):
        alone, fine = one(jax.tree_util.tree_map(lambda x, k=k: x[k], starts))
        assert bool(fine) == bool(sound[k])
        for name in starts:
            np.testing.assert_allclose(together[name][k], alone[name], rtol=1e-9, atol=1e-12)


def test_faults_come_in_the_report_and_are_raised_by_check():
    problem, params, hparams, train, val = regression(JAX)
    estimator = hg.Greedy(hg.SGD(0.1))
    state = estimator.init(problem, params, hparams)
    out = program(estimator, problem)(state, hparams, train | {"y": train["y"] * jnp.nan}, val)
    with pytest.raises(errors.NonFiniteError) as caught:
        estimator.check(out)
    assert caught.value.where == "T1"


class TestDisconnected:
    def test_a_stopped_gradient_is_found_while_tracing(self):
        problem, params, hparams, train, val = regression(JAX)
        stopped = hg.Bilevel(lambda p, h, b: problem.inner(jax.lax.stop_gradient(p), h, b), problem.outer)
        estimator = hg.Greedy(hg.SGD(0.1))
        state = estimator.init(stopped, params, hparams)
        with pytest.raises(errors.DisconnectedError):
            program(estimator, stopped)(state, hparams, train, val)

    def test_an_unused_hyperparameter_behind_a_jit_of_the_users(self):
        problem, params, hparams, train, val = regression(JAX)
        hparams = hparams | {"idle": jnp.ones(3)}
        inner = jax.jit(problem.inner)
        estimator = hg.Greedy(hg.SGD(0.1))
        state = estimator.init(problem, params, hparams)
        with pytest.raises(errors.DisconnectedError) as caught:
            estimator.estimate(hg.Bilevel(inner, problem.outer), state, hparams, train, val)
        assert caught.value.path == "hparams['idle']"


class TestOptax:
    @staticmethod
    def agrees(estimator, extra=None):
        problem, params, hparams, train, val = regression(JAX)
        hparams = hparams | (extra or {})

        @jax.jit
        def estimate(hparams):
            state = estimator.init(problem, params, hparams)
            return estimator.estimate(problem, state, hparams, lambda t: train, val)

        found = estimate(hparams).hypergradient
        for name, h in hparams.items():
            along = jnp.ones_like(h)
            near, far = (
                estimate(hparams | {name: h + k * 1e-4 * along}).outer_value
                - estimate(hparams | {name: h - k * 1e-4 * along}).outer_value
                for k in (1, 2)
            )
            np.testing.assert_allclose(jnp.vdot(found[name], along), (8 * near - far) / 12e-4, rtol=1e-6)

    @pytest.mark.parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_a_chain_with_a_schedule(self, tape):
        decay = optax.exponential_decay(0.1, 10, 0.9)
        self.agrees(hg.Unrolled(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(decay)), 6, tape=tape))

    @pytest.mark.parametrize("steps", [1, 5])
    def test_a_learning_rate_that_is_a_hyperparameter(self, steps):
        tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.5)
        rule = Optax(tx, {"learning_rate": lambda h: h["lr"]})
        self.agrees(hg.Unrolled(rule, steps), {"lr": jnp.asarray(0.05)})

    def test_a_rate_that_was_baked_in_is_refused_with_the_spelling(self):
        problem, params, hparams, train, val = regression(JAX)
        hparams = hparams | {"lr": jnp.asarray(0.05)}
        baked = optax.sgd(hparams["lr"])
        with pytest.raises(errors.DisconnectedError, match=r"inject_hyperparams.*lambda h: h\['lr'\]"):
            hg.hypergradient(problem, params, hparams, train, val, hg.Greedy(baked))

    def test_a_rate_that_is_not_held(self):
        problem, params, hparams, train, val = regression(JAX)
        with pytest.raises(errors.ArgumentError, match="inject_hyperparams"):
            hg.hypergradient(
                problem, params, hparams, train, val, hg.Greedy(Optax(optax.sgd(0.1), {"learning_rate": len}))
            )

    def test_it_moves_hyperparameters_too(self):
        problem, params, hparams, train, val = regression(JAX)
        tuner = hg.Tuner(problem, hg.Greedy(optax.sgd(0.1)), hyper_update=optax.adam(0.1), every=2)
        run = tuner.run(params, hparams, train, val, 4)
        assert not np.allclose(run.hparams["log_l2"], hparams["log_l2"])
