"""JAX: functions inside the losses are differentiated as training shows; jit changes no fault."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import pytest
from numpy.testing import assert_allclose

import hypergrad as hg
from hypergrad import errors

jax = pytest.importorskip("jax")
jnp, lax, tree = jax.numpy, jax.lax, jax.tree_util
ravel_pytree = pytest.importorskip("jax.flatten_util").ravel_pytree

parametrize, ANYWHERE = pytest.mark.parametrize, float("inf")
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


QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # to compile
program = partial(jax.jit, compiler_options=QUICK)


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


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


BATCH, VAL = ({"x": numbers(s, 6, 2), "y": numbers(s + 1, 6)} for s in (0, 2))
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


# Functions with a rule of their own, and with control flow.


@jax.custom_vjp
def log1pexp(x):
    return jnp.where(x > 0, x + jnp.log1p(jnp.exp(-jnp.abs(x))), jnp.log1p(jnp.exp(jnp.minimum(x, 0))))


log1pexp.defvjp(lambda x: (log1pexp(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))


@jax.custom_vjp
def scaled_tanh(x, scale):
    return jnp.tanh(scale * x)


def scaled_tanh_forward(x, scale):
    y = jnp.tanh(scale * x)
    return y, (x, scale, y)


def scaled_tanh_backward(residuals, g):
    x, scale, y = residuals
    slope = g * (1 - y * y)
    return slope * scale, jnp.sum(slope * x)


scaled_tanh.defvjp(scaled_tanh_forward, scaled_tanh_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def through(f, x, power):
    return f(x) ** power


def through_backward(f, power, x, g):
    y, pullback = jax.vjp(f, x)
    return pullback(g * power * y ** (power - 1))


through.defvjp(lambda f, x, power: (through(f, x, power), x), through_backward)


@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.sqrt(1 + x * x))


@softsign.defjvp
def softsign_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = jnp.sqrt(1 + x * x)
    return softsign(x), dx / (root * (1 + root))


def solved(z, gain):
    """The u with u + sin(gain u) / 2 = z, found by a loop that ends when it has found it."""

    def solve(f, u):
        going = lambda u: jnp.max(jnp.abs(f(u))) > 1e-15  # noqa: E731
        newton = lambda u: u - f(u) / (1 + 0.5 * gain * jnp.cos(gain * u))  # noqa: E731
        return lax.while_loop(
            lambda kx: (kx[0] < 50) & going(kx[1]), lambda kx: (kx[0] + 1, newton(kx[1])), (0, u)
        )[1]

    residual = lambda u: u + 0.5 * jnp.sin(gain * u) - z  # noqa: E731
    return lax.custom_root(residual, z, solve, lambda g, y: y / g(jnp.ones_like(y)))


def recurrent(z, gain):
    body = jax.checkpoint(lambda carry, x: (jnp.tanh(gain * carry + x * z), jnp.sin(carry)))
    last, outputs = lax.scan(body, jnp.zeros_like(z), jnp.array([0.5, 1.0, -0.3]))
    return last + jnp.sum(outputs, axis=0)


SAVED = jax.checkpoint_policies.dots_saveable
FUNCTIONS = {
    "custom_vjp": lambda z, gain: log1pexp(3 * gain * z),
    "custom_vjp-with-residuals": scaled_tanh,
    "custom_vjp-with-nondiff_argnums": lambda z, gain: through(jnp.sin, gain * z, 3),
    "custom_jvp": lambda z, gain: softsign(gain * z),
    "checkpoint-with-a-policy": jax.checkpoint(lambda z, a: jnp.tanh(a * jnp.outer(z, z) @ z), policy=SAVED),
    "scan-of-checkpoint": recurrent,
    "cond": lambda z, gain: lax.cond(jnp.sum(z) > gain, jnp.sin, jnp.tanh, gain * z),
    "fori_loop": lambda z, gain: lax.fori_loop(0, 3, lambda i, y: jnp.sin(gain * y) + z / (i + 1), z),
    "while_loop-in-custom_root": solved,
    "vmap": lambda z, gain: jax.vmap(lambda x: x * jnp.cos(gain * x))(z),
    "jit": jax.jit(lambda z, gain: jnp.tanh(gain * z) * gain),
}


@cache
def regression(name):
    params, hparams, batch, val = asarrays(PARAMS, HPARAMS, BATCH, VAL)
    return Reality(fit(FUNCTIONS[name]), params, hparams, lambda t: batch, val)


@parametrize("function", FUNCTIONS)
@each_estimator
def test_a_function_inside_the_losses_is_differentiated_as_training_shows(function, name):
    regression(function).agrees(name)


class TestCustomRules:
    def test_a_safe_one_is_finite_where_its_definition_overflows(self):
        args = asarrays(PARAMS, HPARAMS, BATCH, VAL)
        safe, plain = (
            compiled(EACH["greedy"], fit(lambda z, gain, f=f: f(1e4 * gain * z) / 1e4))(*args)
            for f in (log1pexp, lambda x: jnp.log(1 + jnp.exp(x)))
        )
        assert np.isfinite(EACH["greedy"].check(safe).hypergradient["gain"])
        assert type(caught(EACH["greedy"].check, plain)) is errors.NonFiniteError

    @staticmethod
    @cache
    def reality():
        @jax.custom_vjp
        def stairs(x):
            return jnp.round(4 * x) / 4

        stairs.defvjp(lambda x: (stairs(x), x), lambda x, g: (g * (1 + 0.3 * jnp.sin(x)),))

        def inner(params, hparams, batch):
            # Linear in the stairs: training sees their rule, and nowhere where they really are.
            found = hparams["gain"] * stairs(batch["x"] @ params["w"])
            return jnp.mean(batch["y"] * found) + penalty(params, hparams)

        params, hparams, batch, val = asarrays(PARAMS, HPARAMS, BATCH, VAL)
        problem = hg.Bilevel(inner, fit(lambda z, gain: jnp.tanh(z)).outer)
        return Reality(problem, params, hparams, lambda t: batch, val)

    @parametrize("name", ["greedy", "full", "states"])
    def test_one_that_is_no_derivative_is_followed_as_training_follows_it(self, name):
        self.reality().agrees(name)


# Trees.


@tree.register_pytree_node_class
class Layer:
    """A node with a setting that is no array."""

    def __init__(self, w, b, power=1):
        self.w, self.b, self.power = w, b, power

    def tree_flatten(self):
        return (self.w, self.b), self.power

    @classmethod
    def tree_unflatten(cls, power, children):
        return cls(*children, power)


@partial(tree.register_dataclass, data_fields=["w", "b"], meta_fields=["power"])
@dataclass
class Weights:
    w: object
    b: object
    power: int = field(default=1)


class TestTrees:
    @staticmethod
    @cache
    def reality(node, other):
        def outer(params, hparams, batch):
            found = jnp.tanh(hparams.b * (batch["x"] @ params.w + params.b)) ** params.power
            return jnp.mean((found - batch["y"]) ** 2)

        def inner(params, hparams, batch):
            strength = hparams.power * jnp.exp(hparams.w)
            return outer(params, hparams, batch) + strength * jnp.sum(params.w**2) + params.b**2

        (w, b, log_l2, gain), batch, val = asarrays((PARAMS["w"], 0.2, *HPARAMS.values()), BATCH, VAL)
        params, hparams = node(w, b, power=3), other(log_l2, gain, power=2)
        return Reality(hg.Bilevel(inner, outer), params, hparams, lambda t: batch, val)

    PLACES = [(Layer, Weights, name) for name in ESTIMATORS] + [(Weights, Layer, "states")]

    @parametrize("node, other, name", PLACES)
    def test_custom_nodes_and_dataclasses_hold_parameters_and_hyperparameters(self, node, other, name):
        out = self.reality(node, other).agrees(name)
        assert (type(out.state.params), out.state.params.power) == (node, 3)
        assert (type(out.hypergradient), out.hypergradient.power) == (other, 2)

    def test_an_error_names_the_field_of_a_dataclass(self):
        problem = hg.Bilevel(lambda p, h, x: jnp.sum(h.w * p.w**2) + p.b**2, lambda p, h, x: jnp.sum(p.w**2))
        (given,) = asarrays(Weights(PARAMS["w"], 0.2))
        error = caught(compiled(EACH["greedy"], problem).lower, given, given, None, None)
        assert (type(error), error.path) == (errors.DisconnectedError, "hparams.b")


# Noise.


class TestKeysInTheBatch:
    """The gradient and the mixed derivative see one draw: that is what real training differentiates."""

    @staticmethod
    @cache
    def reality(make, fixed):
        def outer(params, hparams, batch):
            return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)

        def inner(params, hparams, batch):
            noise = jax.random.normal(batch["key"], batch["x"].shape)
            kept = jax.random.bernoulli(jax.random.fold_in(batch["key"], 1), 0.7, batch["y"].shape)
            noisy = batch | {"x": (batch["x"] + hparams["scale"] * noise) * kept[:, None]}
            return outer(params, hparams, noisy) + jnp.sum(params["w"] ** 2)

        batch, val, key = *asarrays(BATCH, VAL), make(7)
        batches = lambda t: batch | {"key": key if fixed else jax.random.fold_in(key, t)}  # noqa: E731
        params, hparams = asarrays(PARAMS, {"scale": 0.6})
        return Reality(hg.Bilevel(inner, outer), params, hparams, batches, val)

    MAKES = [(jax.random.key, name) for name in ESTIMATORS]
    MAKES += [(jax.random.PRNGKey, name) for name in ("greedy", "states", "implicit")]

    @parametrize("make, name", MAKES)
    def test_a_key_of_the_batch_serves_every_derivative(self, make, name):
        self.reality(make, fixed=name == "implicit").agrees(name)

    @parametrize("make, name", [(jax.random.PRNGKey, "full"), (jax.random.key, "states")])
    def test_keys_in_a_list_of_batches(self, make, name):
        reality = self.reality(make, fixed=False)
        reality.agrees(name, reality.by(name, [reality.train(t) for t in range(4)]))


# Precision and configuration.


def single_precision(trained):
    """Estimates in float32, from a process without x64; `Implicit` begins at the parameters given."""
    before = dict(jax.config.values)
    trained = {"w": np.array(trained["w"])}
    params, trained, hparams, batch, val = tree.tree_map(jnp.float32, (PARAMS, trained, HPARAMS, BATCH, VAL))
    problem, found, dtypes = fit(FUNCTIONS["custom_vjp"]), {}, set()
    for name, estimator in EACH.items():
        if name == "implicit":
            estimator, params = hg.Implicit(hg.CG(rtol=1e-5)), trained
        run = eager(estimator, problem)
        ways = {"jit": program(run, static_argnums=2)} | ({"eager": run} if name == "greedy" else {})
        for way, call in ways.items():
            out = estimator.check(call(params, hparams, lambda t: batch, val))
            seen = out.hypergradient, out.state.params, out.inner_value, out.outer_value
            dtypes |= {str(x.dtype) for x in tree.tree_leaves(seen)}
            found[f"{name}-{way}"] = {k: float(x) for k, x in out.hypergradient.items()}
    after = dict(jax.config.values)
    changed = [k for k in before | after if before.get(k) != after.get(k)]
    return {"found": found, "dtypes": sorted(dtypes), "changed": changed}


@pytest.fixture(scope="module")
def single():
    """What a process without x64 found."""
    trained = {"w": regression("custom_vjp").after(TRAINED)[1]["w"].tolist()}
    env = os.environ | {"JAX_ENABLE_X64": "0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", __file__, json.dumps(trained)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestConfiguration:
    def test_without_x64_everything_is_float32(self, single):
        assert single["dtypes"] == ["float32"]

    def test_no_setting_of_jax_is_changed(self, single):
        assert single["changed"] == []

    @parametrize("way", ["greedy-eager", *(f"{name}-jit" for name in ESTIMATORS)])
    def test_float32_gives_what_float64_gives(self, single, way):
        expected = regression("custom_vjp").estimate(way.partition("-")[0]).hypergradient
        found = single["found"][way]
        assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-3)


# What JAX cannot differentiate.


def callback(z, gain):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(z.shape, z.dtype), gain * z)


@jax.custom_vjp
def once(x):
    """Its rule calls back, so that it has a first derivative and no second one."""
    return jnp.tanh(x)


def once_backward(x, g):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (jax.pure_callback(lambda x, g: g / np.cosh(x) ** 2, shape, x, g),)


once.defvjp(lambda x: (once(x), x), once_backward)


def until_small(z, gain):
    return lax.while_loop(lambda y: jnp.sum(y**2) > 0.1, lambda y: 0.5 * gain * y, z)


def as_often_as(z, gain):
    return lax.fori_loop(0, jnp.int32(jnp.sum(z**2)), lambda i, y: jnp.sin(gain * y), z)


WITHOUT = {
    "while_loop": (until_small, "while_loop"),
    "fori_loop-with-a-traced-bound": (as_often_as, "while_loop|fori_loop"),
    "pure_callback": (callback, "callback"),
    "custom_vjp-that-calls-back": (lambda z, gain: once(gain * z), "callback"),
}


class TestWithoutDerivative:
    @each_estimator
    @parametrize("f, operation", WITHOUT.values(), ids=WITHOUT)
    def test_is_refused_by_name(self, name, f, operation):
        params, hparams, batch, val = asarrays(PARAMS, HPARAMS, BATCH, VAL)
        with pytest.raises(errors.UnsupportedOpError, match=operation):
            compiled(EACH[name], fit(f)).lower(params, hparams, batch, val)

    @parametrize(
        "take", [partial(hg.Greedy, RULE), partial(hg.Implicit, hg.CG(rtol=1e-4), tolerance=ANYWHERE)]
    )
    def test_without_a_second_one_differences_serve(self, take):
        args, (f, _) = asarrays(PARAMS, HPARAMS, BATCH, VAL), WITHOUT["custom_vjp-that-calls-back"]
        exact, mixed = take(), take(mixed=hg.FiniteDifference())
        found = mixed.check(compiled(mixed, fit(f))(*args)).hypergradient
        expected = compiled(exact, fit(lambda z, gain: jnp.tanh(gain * z)))(*args).hypergradient
        assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-3)


# The contract: what is raised while tracing, and what is carried in the report.


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


def caught(call, *args):
    with pytest.raises(errors.HypergradError) as found:
        call(*args)
    return found.value


def same(mine, other):
    """Errors of one class with the same attributes."""

    def attributes(error):
        return {name: value for name, value in vars(error).items() if name != "__notes__"}  # which JAX adds

    close = {
        k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in attributes(other).items()
    }
    assert type(mine) is type(other) and attributes(mine) == close


def ridge(params, hparams, batch):
    return judged(params, hparams, batch) + jnp.sum(hparams["x"] ** 2 * params["w"] ** 2)


def judged(params, hparams, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


RIDGE = hg.Bilevel(ridge, judged)
GIVEN = {
    "params": {"w": PARAMS["w"]},
    "hparams": {"x": np.array([-1.0, 0.5])},
    "train": [BATCH] * 4,
    "val": VAL,
}
SINGLE = tree.tree_map(np.float32, GIVEN)
TRACED = {
    "integer-params": ({"params": {"w": np.ones(2, int)}}, RIDGE, errors.LeafTypeError),
    "integer-hparams": ({"hparams": {"x": np.ones(2, int)}}, RIDGE, errors.LeafTypeError),
    "boolean-hparams": ({"hparams": {"x": np.ones(2, bool)}}, RIDGE, errors.LeafTypeError),
    "complex-hparams": ({"hparams": {"x": np.ones(2, complex)}}, RIDGE, errors.UnsupportedLeafError),
    "mixed-dtypes": ({"hparams": SINGLE["hparams"]}, RIDGE, errors.LeafTypeError),
    "a-wider-T1": (SINGLE | {"train": GIVEN["train"]}, RIDGE, errors.LeafTypeError),
    "a-wider-T2": (SINGLE | {"val": GIVEN["val"]}, RIDGE, errors.LeafTypeError),
    "empty-params": ({"params": {}}, RIDGE, errors.ArgumentError),
    "empty-hparams": ({"hparams": {}}, RIDGE, errors.ArgumentError),
    "no-scalar-in-T1": ({}, hg.Bilevel(lambda p, h, b: h["x"] * p["w"], judged), errors.ArgumentError),
    "no-scalar-in-T2": ({}, hg.Bilevel(ridge, lambda p, h, b: p["w"]), errors.ArgumentError),
    "no-array-in-T1": ({}, hg.Bilevel(lambda p, h, b: None, judged), errors.ArgumentError),
    "an-integer-in-T2": (
        {},
        hg.Bilevel(ridge, lambda p, h, b: p["w"].size * jnp.int32(1)),
        errors.ArgumentError,
    ),
    "an-unused-hyperparameter": (
        {"hparams": {"x": np.ones(2), "idle": np.ones(3)}},
        RIDGE,
        errors.DisconnectedError,
    ),
    "a-stopped-hyperparameter": (
        {},
        hg.Bilevel(lambda p, h, b: ridge(p, lax.stop_gradient(h), b), judged),
        errors.DisconnectedError,
    ),
    "stopped-parameters-in-T1": (
        {},
        hg.Bilevel(lambda p, h, b: ridge(lax.stop_gradient(p), h, b), judged),
        errors.DisconnectedError,
    ),
    "stopped-parameters-in-T2": (
        {},
        hg.Bilevel(ridge, lambda p, h, b: judged(lax.stop_gradient(p), h, b)),
        errors.DisconnectedError,
    ),
    "no-batches": ({"train": []}, RIDGE, errors.ArgumentError),
}
OF_UPDATES = {
    "a-shape": ((lambda p: (), lambda g, s, p, h: ({"w": p["w"][:1]}, s)), {}, errors.ArgumentError),
    "a-key": ((lambda p: (), lambda g, s, p, h: ({"v": p["w"]}, s)), {}, errors.ArgumentError),
    "its-state": ((lambda p: p, lambda g, s, p, h: (p, {"w": s["w"][:1]})), {}, errors.ArgumentError),
    "a-dtype": (
        (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - np.full(2, 0.1) * g["w"]}, s)),
        SINGLE,
        errors.LeafTypeError,
    ),
    "by-a-vector-of-rates": (hg.SGD(lambda h: h["x"]), {}, errors.ArgumentError),
}


class TestRaisedWhileTracing:
    """Without a value: `lower` runs nothing."""

    @staticmethod
    def agree(estimator, problem, given, kind):
        args = asarrays(*(GIVEN | given).values())
        error = caught(eager(estimator, problem), *args)
        assert type(error) is kind
        traced = caught(compiled(estimator, problem).lower, *args)
        same(traced, error)
        assert str(traced) == str(error)

    @parametrize("name, case", [(n, case) for case in TRACED for n in EACH if n in ("greedy", "implicit")])
    def test_what_shapes_dtypes_and_the_graph_show(self, name, case):
        given, problem, kind = TRACED[case]
        self.agree(EACH[name], problem, given, kind)

    @parametrize("case", ["integer-hparams", "a-wider-T1", "no-scalar-in-T1", "an-unused-hyperparameter"])
    def test_what_is_seen_inside_of_a_loop(self, case):
        given, problem, kind = TRACED[case]
        self.agree(EACH["states"], problem, given, kind)

    @parametrize("train_by", [hg.Greedy, partial(hg.Unrolled, steps=3)], ids=["greedy", "unrolled"])
    @parametrize("rule, given, kind", OF_UPDATES.values(), ids=OF_UPDATES)
    def test_updates_that_change(self, train_by, rule, given, kind):
        self.agree(train_by(rule), RIDGE, given, kind)

    @parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_fewer_batches_than_steps(self, tape):
        self.agree(hg.Unrolled(RULE, 5, tape=tape), RIDGE, {}, errors.ArgumentError)

    @parametrize("name", ["greedy", "full", "states"])
    def test_a_state_of_other_parameters(self, name):
        params, hparams, (train, *_), val = asarrays(*GIVEN.values())
        state = EACH[name].init(RIDGE, {"w": jnp.zeros(3)}, hparams)._replace(params=params)
        run = lambda *args: EACH[name].estimate(RIDGE, *args)  # noqa: E731
        args = state, hparams, lambda t: train, val
        error = caught(run, *args)
        assert "(2,)" in str(error) and "(3,)" in str(error)
        same(caught(jax.jit(run, static_argnums=2).lower, *args), error)

    def test_a_hessian_too_large_to_be_formed(self):
        self.agree(hg.Implicit(hg.Direct(max_unknowns=1)), RIDGE, {}, errors.ArgumentError)


def rooted(loss):
    """Add √ of a parameter and of a hyperparameter, shifted away from zero or switched off by the batch."""

    def with_roots(params, hparams, batch):
        on, shift = batch["on"], batch["shift"]
        of_params = on[0] * jnp.sqrt(params["w"][0] + shift[0])
        of_hparams = on[1] * params["w"][1] * jnp.sqrt(hparams["x"][0] + shift[1])
        return loss(params, hparams, batch) + of_params + of_hparams

    return with_roots


ROOTED = hg.Bilevel(rooted(ridge), rooted(judged))
ZERO = {"params": {"w": np.array([0.0, 0.5])}, "hparams": {"x": np.array([0.0, 0.5])}}
OFF = {"on": np.zeros(2), "shift": np.ones(2)}
STILL = {"x": np.zeros((6, 2)), "y": np.zeros(6)} | OFF  # leaves a zero where it is
W, X = "params['w']", "hparams['x']"
AT_ZERO = {
    W: {"on": np.array([1.0, 0.0]), "shift": np.array([0.0, 1.0])},
    X: {"on": np.array([0.0, 1.0]), "shift": np.array([1.0, 0.0])},
}
NAN = {"y": np.full(6, np.nan)}
INNER = EACH | {"implicit": hg.Implicit(hg.CG(), tolerance=ANYWHERE)}


@cache
def program_with_roots(name):
    return compiled(INNER[name], ROOTED)


class TestNotFinite:
    """Carried in the report and raised by `check`, as eager estimates raise it."""

    @staticmethod
    def agree(name, **given):
        params, hparams, train, val = asarrays(
            *(ZERO | {"train": [STILL] * 4, "val": VAL | OFF} | given).values()
        )
        error = caught(eager(INNER[name], ROOTED), params, hparams, train, val)
        out = program_with_roots(name)(params, hparams, train, val)
        same(caught(INNER[name].check, out), error)
        return error

    @parametrize("name", INNER)
    def test_a_loss_on_t1(self, name):
        bad = 0 if name in ("greedy", "implicit") else 2
        train = [STILL | (NAN if t == bad else {}) for t in range(4)]
        error = self.agree(name, train=train)
        assert (error.where, error.step, error.path) == ("T1", bad, None)

    @parametrize("name", ["greedy", "states", "implicit"])
    def test_a_loss_on_t2(self, name):
        error = self.agree(name, val=VAL | OFF | NAN)
        steps = INNER[name].training_steps
        assert (error.where, error.step, error.path) == ("T2", steps, None)

    @parametrize("name, path", [*(("greedy", path) for path in AT_ZERO), ("states", X), ("implicit", W)])
    def test_a_root_at_zero_on_t1(self, name, path):
        error = self.agree(name, train=[STILL | AT_ZERO[path]] * 4)
        assert (error.where, error.path) == ("T1", path)

    @parametrize("name, path", [*(("greedy", path) for path in AT_ZERO), ("states", W), ("implicit", X)])
    def test_a_root_at_zero_on_t2(self, name, path):
        error = self.agree(name, val=VAL | AT_ZERO[path])
        assert (error.where, error.path) == ("T2", path)

    @parametrize("name", ["greedy", "states"])
    def test_the_step_is_counted_from_the_beginning_of_training(self, name):
        params, hparams, train, val = asarrays(*(ZERO | {"train": STILL | NAN, "val": VAL | OFF}).values())
        estimator = INNER[name]
        state = estimator.init(ROOTED, params, hparams)._replace(step=5)
        run = program(lambda s, h, t, v: estimator.estimate(ROOTED, s, h, lambda _: t, v))
        assert caught(estimator.check, run(state, hparams, train, val)).step == 5


def quadratic(params, hparams, batch):
    """A Hessian that is a hyperparameter, where the gradient is zero."""
    w = params["w"]
    return 0.5 * w @ (hparams["hessian"] @ w) + hparams["x"] * jnp.sum(w)


QUADRATIC = hg.Bilevel(quadratic, lambda p, h, b: jnp.sum(p["w"]))
WIDE = np.diag([1.0, 2.0, 5.0, 9.0])
SOLVES = {
    "cg-negative_curvature": (hg.CG(), np.diag([2.0, -1.0]), "negative_curvature"),
    "cg-singular": (hg.CG(), np.diag([1.0, 0.0]), "singular"),
    "cg-max_steps": (hg.CG(max_steps=2), WIDE, "max_steps"),
    "direct-singular": (hg.Direct(), np.diag([1.0, 0.0]), "singular"),
    "neumann-diverged": (hg.Neumann(100, 1.0), np.diag([1.0, 10.0]), "diverged"),
    "neumann-negative_curvature": (hg.Neumann(100, 0.1, 1e-6), np.diag([2.0, -1.0]), "negative_curvature"),
}


def quadratic_args(hessian, slope=0.0):
    return asarrays({"w": np.zeros(len(hessian))}, {"x": slope, "hessian": hessian}, None, None)


def warned(call, *args):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(*args)
    return [(w.category, str(w.message)) for w in found]


class TestSolves:
    @parametrize("solver, hessian, reason", SOLVES.values(), ids=SOLVES)
    def test_what_failed_is_carried_and_raised(self, solver, hessian, reason):
        strict, args = hg.Implicit(solver), quadratic_args(hessian)
        error = caught(eager(strict, QUADRATIC), *args)
        out = compiled(strict, QUADRATIC)(*args)
        found = caught(strict.check, out)
        same(found, error)
        assert (type(found), found.reason) == (errors.SolveError, reason) and found.residual > 1e-6
        lenient = hg.Implicit(solver, on_failure="warn")
        (category, message), *_ = warned(lenient.check, out)
        assert category is errors.SolveWarning and message == str(found)

    def test_away_from_the_optimum(self):
        args = quadratic_args(np.diag([1.0, 2.0]), slope=0.3)
        lenient, strict = hg.Implicit(hg.CG()), hg.Implicit(hg.CG(), strict=True)
        out = compiled(lenient, QUADRATIC)(*args)
        expected = warned(eager(lenient, QUADRATIC), *args)
        assert expected == warned(lenient.check, out)
        assert [category for category, _ in expected] == [errors.InnerNotConvergedWarning]
        same(caught(strict.check, out), caught(eager(strict, QUADRATIC), *args))

    def test_differences_that_disagree(self):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, h, b) + jnp.sum(jnp.abs(p["w"]) * h["x"]), judged)
        estimator = hg.Greedy(RULE, mixed=hg.FiniteDifference(radius=0.3))
        params, hparams, (train, *_), val = asarrays(
            *(GIVEN | {"params": {"w": np.array([0.1, -0.7])}}).values()
        )
        error = caught(eager(estimator, problem), params, hparams, train, val)
        assert type(error) is errors.DifferenceError
        same(caught(estimator.check, compiled(estimator, problem)(params, hparams, train, val)), error)


class TestManyStarts:
    """Under vmap each start has a status of its own."""

    @staticmethod
    def statuses(estimator, problem, params, starts, train, val):
        """The report on all starts, and what comes of each, the same from one program for all and for one."""

        def outcome(out):
            try:
                return estimator.check(out)
            except errors.HypergradError as error:
                return error

        run, alone = eager(estimator, problem), compiled(estimator, problem)
        out = program(jax.vmap(lambda h: run(params, h, lambda t: train, val)))(starts)
        found = []
        for k in range(len(tree.tree_leaves(starts)[0])):
            pick = partial(tree.tree_map, lambda x, k=k: x[k])
            mine, other = outcome(pick(out)), outcome(alone(params, pick(starts), train, val))
            if isinstance(other, errors.HypergradError):
                same(mine, other)
            else:
                for leaf, expected in other.hypergradient.items():
                    assert_allclose(mine.hypergradient[leaf], expected, rtol=1e-9, atol=1e-12)
            found.append(mine)
        return out.report, found

    @parametrize("name", ["greedy", "states"])
    def test_a_loss_that_is_not_finite(self, name):
        params, hparams, (train, *_), val = asarrays(*GIVEN.values())
        starts = {"x": jnp.stack([hparams["x"], hparams["x"] * jnp.inf, 2 * hparams["x"]])}
        report, (first, bad, last) = self.statuses(EACH[name], RIDGE, params, starts, train, val)
        assert report.bad_step.tolist() == [-1, 0, -1]
        assert isinstance(first, hg.Estimate) and isinstance(last, hg.Estimate)
        assert (type(bad), bad.where, bad.step) == (errors.NonFiniteError, "T1", 0)

    @parametrize("solver", [hg.CG(), hg.Direct()], ids=repr)
    def test_a_solve_that_failed(self, solver):
        diagonals = np.array([[1.0, 2.0], [1.0, 0.0], [2.0, -1.0], [3.0, 3.0]])
        params, _, train, val = quadratic_args(np.eye(2))
        starts = {"x": jnp.zeros(4), "hessian": jnp.asarray([np.diag(d) for d in diagonals])}
        report, found = self.statuses(hg.Implicit(solver), QUADRATIC, params, starts, train, val)
        assert report.failure.tolist() == [0, 1, 2, 0]
        assert [getattr(x, "reason", None) for x in found] == [None, "singular", "negative_curvature", None]
        assert report.iterations.shape == report.residual.shape == (4,)


if __name__ == "__main__":
    json.dump(single_precision(json.loads(sys.argv[1])), sys.stdout)
