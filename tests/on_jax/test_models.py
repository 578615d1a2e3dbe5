"""Models of flax and equinox with BatchNorm and dropout: statistics and keys are their auxiliary state."""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.errors import LeafTypeError

jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
nn, nnx = (pytest.importorskip(f"flax.{name}", exc_type=ImportError) for name in ("linen", "nnx"))
eqx = pytest.importorskip("equinox")
jnp, tree = jax.numpy, jax.tree

DECAY = optax.exponential_decay(0.05, 2, 0.9)
OPTAX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(DECAY, eps_root=1e-6))
SGD = hg.SGD(0.1, momentum=0.9)
COUNT = 8  # examples in a batch


def double(given):
    """Floats as float64; BatchNorm of flax makes its statistics float32."""
    return tree.map(lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x, given)


def data(seed):
    x = jax.random.normal(jax.random.key(seed), (COUNT, 3))
    return x, jnp.sin(2.0 * x[:, 0]) + x[:, 1] * x[:, 2]


def noisy(x, hparams, key):
    return x + jnp.exp(hparams["noise"]) * jax.random.normal(key, x.shape)


def error(out, y):
    return jnp.mean((out - y) ** 2)


def penalty(params, hparams):
    """A strength for each matrix of weights."""
    weights = [w for w in tree.leaves(params) if w.ndim == 2]
    return sum(s * jnp.sum(w**2) for s, w in zip(jnp.exp(hparams["log_l2"]), weights, strict=True))


@dataclass(frozen=True, eq=False)
class Case:
    """A model's problem, where its training begins, and its batches."""

    problem: hg.Bilevel
    params: Any
    aux: Any
    train: Any = field(default_factory=lambda: lambda t: data(0))
    val: Any = field(default_factory=lambda: data(1))
    hparams: Any = field(
        default_factory=lambda: {"log_l2": jnp.array([-4.0, -3.0]), "noise": jnp.array(-1.5, "float64")}
    )

    def check(self, estimator, hparams=None):
        hparams = self.hparams if hparams is None else hparams
        given = self.problem, self.params, hparams, self.train, self.val, estimator
        return hg.check_hypergradient(*given, aux=self.aux)

    def run(self, tuner, steps, hparams=None, **options):
        given = self.params, hparams or self.hparams, self.train, self.val, steps
        return tuner.run(*given, aux=self.aux, **options)


# A bias before BatchNorm has no gradient, which Adam would magnify: the first layers have none.


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))[:, 0]


def of_nnx():
    """Its keys and counters are in the state of the model."""
    graph, params, aux = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def inner(params, hparams, batch, aux):
        model = nnx.merge(graph, params, aux)
        x, y = batch
        loss = error(model(noisy(x, hparams, model.rngs.noise())), y) + penalty(params, hparams)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def outer(params, hparams, batch, aux):
        model = nnx.merge(graph, params, aux)
        model.eval()
        x, y = batch
        return error(model(x), y)

    return Case(hg.Bilevel(inner, outer, has_aux=True), double(params), double(aux))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, use_bias=False)(x)
        x = nn.BatchNorm(momentum=0.8, use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1)(x)[:, 0]


def of_linen(cast=double):
    """A key comes with the batch."""
    model = LinenNet()
    variables = model.init(jax.random.key(0), data(0)[0])
    params, aux = double(variables.pop("params")), cast(variables)

    def inner(params, hparams, batch, aux):
        x, y, key = batch
        dropout, noise = jax.random.split(key)
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": dropout}}
        out, aux = model.apply({"params": params, **aux}, noisy(x, hparams, noise), **options)
        return error(out, y) + penalty(params, hparams), aux

    def outer(params, hparams, batch, aux):
        x, y = batch
        return error(model.apply({"params": params, **aux}, x), y)

    return Case(hg.Bilevel(inner, outer, has_aux=True), params, aux, with_key)


class EqxNet(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        first, last = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, use_bias=False, key=first)
        self.norm = eqx.nn.BatchNorm(4, "batch", momentum=0.8, mode="batch")
        self.dropout = eqx.nn.Dropout(0.2)
        self.last = eqx.nn.Linear(4, 1, key=last)

    def __call__(self, x, aux, key=None):
        x, aux = self.norm(self.first(x), aux)
        return self.last(self.dropout(jnp.tanh(x), key=key))[0], aux


def of_equinox():
    """A key comes with the batch."""
    model, aux = eqx.nn.make_with_state(EqxNet)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def inner(params, hparams, batch, aux):
        x, y, key = batch
        dropout, noise = jax.random.split(key)
        model, keys = eqx.combine(params, static), jax.random.split(dropout, COUNT)
        train = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
        out, aux = train(noisy(x, hparams, noise), aux, keys)
        return error(out, y) + penalty(params, hparams), aux

    def outer(params, hparams, batch, aux):
        x, y = batch
        model = eqx.nn.inference_mode(eqx.combine(params, static))
        out, _ = jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, aux)
        return error(out, y)

    return Case(hg.Bilevel(inner, outer, has_aux=True), params, aux, with_key)


def with_key(t):
    return *data(0), jax.random.fold_in(jax.random.key(7), t)


def keyed(make):
    """The same with a key in aux, which the inner loss splits."""
    case = make()
    inside = case.problem

    def inner(params, hparams, batch, aux):
        aux, key = aux
        key, now = jax.random.split(key)
        loss, aux = inside.inner(params, hparams, (*batch, now), aux)
        return loss, (aux, key)

    def outer(params, hparams, batch, aux):
        return inside.outer(params, hparams, batch, aux[0])

    return Case(hg.Bilevel(inner, outer, has_aux=True), case.params, (case.aux, jax.random.key(7)))


MODELS = {
    "nnx": of_nnx,
    "linen": of_linen,
    "linen, key in aux": partial(keyed, of_linen),
    "equinox": of_equinox,
    "equinox, key in aux": partial(keyed, of_equinox),
}
CASE = cache(lambda model: MODELS[model]())
RULES = {"sgd": SGD, "optax": OPTAX}
ESTIMATORS = {
    "greedy": hg.Greedy,
    "full": partial(hg.Unrolled, steps=3),
    "states": partial(hg.Unrolled, steps=3, tape=hg.States()),
}


class TestHypergradients:
    @pytest.mark.parametrize(
        "model, estimator, rule",
        [
            ("nnx", "greedy", "optax"),
            ("nnx", "states", "sgd"),
            ("linen", "greedy", "sgd"),
            ("linen, key in aux", "full", "optax"),
            ("equinox, key in aux", "states", "optax"),
        ],
    )
    def test_are_derivatives_of_training(self, model, estimator, rule):
        check = CASE(model).check(ESTIMATORS[estimator](RULES[rule]))
        assert check.relative_error <= 1e-6 and check.exact_relative_error <= 1e-9

    def test_by_a_learning_rate_that_optax_holds(self):
        from hypergrad_jax import Optax

        tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.5)
        rule = Optax(tx, {"learning_rate": lambda h: jnp.exp(h["log_lr"])})
        case = CASE("equinox")
        check = case.check(hg.Greedy(rule), case.hparams | {"log_lr": jnp.array(-2.0)})
        assert check.relative_error <= 1e-6 and check.exact_relative_error <= 1e-9


class Tuned:
    """A run of 20 steps with four updates of the hyperparameters."""

    def __init__(self, model):
        self.case = CASE(model)
        self.tuner = hg.Tuner(self.case.problem, hg.Greedy(OPTAX), hyper_update=optax.adam(0.05), every=5)
        self.run = self.case.run(self.tuner, 20)


TUNED = cache(Tuned)


def leaves(*given):
    """Values as NumPy arrays, those of keys too."""
    found = tree.leaves(given)
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in found
    ]


def same(mine, other, rtol=0.0):
    for a, b in zip(leaves(mine), leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


class TestTuner:
    @pytest.mark.parametrize("model", ["nnx", "linen, key in aux", "equinox"])
    def test_lowers_the_loss_and_moves_the_state_of_the_model(self, model):
        case, run = TUNED(model).case, TUNED(model).run
        losses, aux = run.history.inner_values, run.state.inner.aux
        assert losses.shape == (20,) and losses[-5:].mean() < 0.8 * losses[:5].mean()
        assert tree.structure(aux) == tree.structure(case.aux)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(aux)]
        pairs = zip(paths, leaves(aux), leaves(case.aux), strict=True)
        still = {path for path, now, then in pairs if np.array_equal(now, then)}
        # A stream of nnx moves its counter and keeps its key; that for parameters drew before training.
        assert still == (
            {path for path in paths if "key" in path or "params" in path} if model == "nnx" else set()
        )

    @pytest.mark.parametrize("model", ["nnx", "linen, key in aux"])
    def test_goes_on_from_a_file_as_from_memory(self, model, tmp_path):
        case, tuner, run = TUNED(model).case, TUNED(model).tuner, TUNED(model).run
        tuner.save(tmp_path / "run.npz", run)
        read = tuner.load(tmp_path / "run.npz", case.params, case.hparams, aux=case.aux)
        one, other = (case.run(tuner, 40, resume=half) for half in (read, (run.state, run.history)))
        same(*((end.params, end.hparams, end.state.inner.aux) for end in (one, other)))

    def test_runs_many_starts_in_one_program(self):
        case, tuner, alone = TUNED("equinox").case, TUNED("equinox").tuner, TUNED("equinox").run
        starts = tree.map(lambda x: jnp.stack([x + k for k in (0.0, 1.0, -1.0, 0.5)]), case.hparams)
        runs = jax.vmap(lambda h: case.run(tuner, 20, h))(starts)
        assert runs.history.outer_values.shape == (4, 5) and len(set(np.asarray(runs.hparams["noise"]))) == 4
        first = tree.map(lambda x: x[0], runs)
        same(*((one.params, one.hparams, one.state.inner.aux) for one in (first, alone)), rtol=1e-9)


class TestWhatAModelDoesToItsState:
    def test_statistics_of_another_precision_are_refused_by_name(self):
        case = of_linen(cast=lambda aux: aux)
        with pytest.raises(
            LeafTypeError, match=r"aux\['batch_stats'\].*\['mean'\].*float64, expected float32"
        ):
            case.check(hg.Greedy(SGD))

    def test_a_layer_may_use_it_up(self):
        """A state of equinox is void once it has been set, as a safeguard; outside of `vmap` one sees it."""

        class Counting(eqx.Module):
            w: jax.Array
            count: eqx.nn.StateIndex

            def __init__(self):
                self.w, self.count = jnp.array([0.3, -0.2, 0.1]), eqx.nn.StateIndex(jnp.array(1))

            def __call__(self, x, aux):
                count = aux.get(self.count)
                return x @ self.w / count, aux.set(self.count, count + 1)

        model, aux = eqx.nn.make_with_state(Counting)()
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def inner(params, hparams, batch, aux):
            out, aux = eqx.combine(params, static)(batch[0], aux)
            return error(out, batch[1]) + jnp.exp(hparams) * jnp.sum(params.w**2), aux

        def outer(params, hparams, batch, aux):
            return error(eqx.combine(params, static)(batch[0], aux)[0], batch[1])

        problem = hg.Bilevel(inner, outer, has_aux=True)
        case = Case(problem, params, aux, lambda t: data(0), hparams=jnp.array(-2.0))
        check = case.check(hg.Unrolled(SGD, 2))
        assert check.relative_error <= 1e-6 and check.exact_relative_error <= 1e-9
        tree.leaves(aux)  # this one is still good
