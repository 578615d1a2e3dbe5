"""Training in JAX, its central differences, and the estimates that they judge."""

from functools import cache, partial

import numpy as np
import pytest
from numpy.testing import assert_allclose

import hypergrad as hg

jax = pytest.importorskip("jax")
from support import quick_xla  # noqa: E402

jnp, lax, tree = jax.numpy, jax.lax, jax.tree_util
ravel_pytree = pytest.importorskip("jax.flatten_util").ravel_pytree
parametrize = pytest.mark.parametrize
RATE, MOMENTUM, RULE = 0.1, 0.5, hg.SGD(0.1, momentum=0.5)
TRAINED = 600  # steps after which nothing moves any more
ESTIMATORS = {  # and the steps of real training that each stands for
    "greedy": (hg.Greedy(RULE), 1),
    "full": (hg.Unrolled(RULE, 4), 4),
    "states": (hg.Unrolled(RULE, 4, tape=hg.States()), 4),
    "implicit": (hg.Implicit(hg.CG(rtol=1e-10)), TRAINED),
}
each_estimator = parametrize("name", ESTIMATORS)
EACH = {name: estimator for name, (estimator, _) in ESTIMATORS.items()}
program = partial(jax.jit, compiler_options=quick_xla.OPTIONS)


def eager(estimator, problem):
    """Initialise and estimate, at once."""

    def run(params, hparams, train, val):
        state = estimator.init(problem, params, hparams)
        return estimator.estimate(problem, state, hparams, train, val)

    return run


def compiled(estimator, problem):
    run = eager(estimator, problem)
    each = lambda train: train if isinstance(train, list) else lambda t: train  # noqa: E731
    return program(lambda params, hparams, train, val: run(params, hparams, each(train), val))


class Reality:
    """Training by plain gradient descent with momentum, and its five-point central differences by λ."""

    def __init__(self, problem, params, hparams, train, val, h=1e-3):
        flat, unravel = ravel_pytree(hparams)
        moves = [k * h * unit for unit in jnp.eye(flat.size) for k in (-2, -1, 1, 2)]
        zeros = tree.tree_map(jnp.zeros_like, params)

        def end(steps, point):
            def step(t, carry):
                theta, velocity = carry
                slope = jax.grad(problem.inner)(theta, unravel(point), train(t))
                velocity = tree.tree_map(lambda m, g: MOMENTUM * m + g, velocity, slope)
                return tree.tree_map(lambda w, m: w - RATE * m, theta, velocity), velocity

            theta, _ = lax.fori_loop(0, steps, step, (params, zeros))
            return problem.outer(theta, unravel(point), val), theta

        points = jnp.stack([flat, *(flat + move for move in moves)])
        self._run = program(lambda steps: lax.map(partial(end, steps), points))
        self._weights = np.array([1, -8, 8, -1]) / (12 * h)
        self.problem, self.params, self.hparams, self.train, self.val = problem, params, hparams, train, val

    @cache  # noqa: B019
    def after(self, steps):
        """dC2/dλ of that much training, as one vector, and where it ends."""
        values, ends = self._run(steps)
        slope = np.asarray(values[1:]).reshape(-1, 4) @ self._weights
        return slope, tree.tree_map(lambda ends: ends[0], ends)

    @cache  # noqa: B019
    def estimate(self, name):
        """The compiled estimate: `Implicit` begins where training ends."""
        return self.by(name, self.train)

    def by(self, name, train):
        estimator, _ = ESTIMATORS[name]
        run = program(eager(estimator, self.problem), static_argnums=2 if callable(train) else ())
        start = self.params if estimator.training_steps else self.after(TRAINED)[1]
        return estimator.check(run(start, self.hparams, train, self.val))

    def agrees(self, name, out=None):
        """The estimate is what the differences are; it is returned."""
        out = self.estimate(name) if out is None else out
        expected, end = self.after(ESTIMATORS[name][1])
        found, _ = ravel_pytree(out.hypergradient)
        assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
        for mine, theirs in zip(*map(tree.tree_leaves, (out.state.params, end)), strict=True):
            assert_allclose(mine, theirs, rtol=1e-9)
        assert tree.tree_structure(out.hypergradient) == tree.tree_structure(self.hparams)
        assert tree.tree_structure(out.state.params) == tree.tree_structure(self.params)
        return out


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


BATCH, VAL = ({"x": normals(s, 6, 2), "y": normals(s + 1, 6)} for s in (0, 2))
PARAMS = {"w": np.array([0.4, -0.7])}
HPARAMS = {"gain": np.array(0.8), "log_l2": np.array(-0.5)}


def asarrays(*trees):
    return tree.tree_map(jnp.asarray, trees)


def penalty(params, hparams):
    return jnp.exp(hparams["log_l2"]) * jnp.sum(params["w"] ** 2)


def fit(f):
    """Regression through f(z, gain), with a penalty."""

    def outer(params, hparams, batch):
        return jnp.mean((f(batch["x"] @ params["w"], hparams["gain"]) - batch["y"]) ** 2)

    return hg.Bilevel(lambda p, h, batch: outer(p, h, batch) + penalty(p, h), outer)
