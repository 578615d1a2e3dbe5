"""The algebra on random problems: every identity that the estimators promise, and who else agrees.

A problem is drawn twice over: as a cost of flat vectors, which the dense formulas of the textbook
read, and as the same cost of random trees, which the library reads. Everything random is in the batch.
"""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import autograd.numpy as np
import numpy as onp
import optree
import pytest
from hypergrad_numpy import textbook
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad import spaces
from hypergrad.backend import get_backend
from hypergrad.check import ridders

hundred = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
BACKEND = get_backend("numpy")
T = 3


# Trees: dicts, lists and tuples of scalars, vectors, matrices, empty arrays and None.


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in optree.tree_leaves(tree)])


def cut(vector, skeleton):
    """The vector's entries in the shape of a tree."""
    leaves, spec = optree.tree_flatten(skeleton)
    parts = onp.split(vector, onp.cumsum([leaf.size for leaf in leaves])[:-1])
    return spec.unflatten([part.reshape(leaf.shape).copy() for part, leaf in zip(parts, leaves, strict=True)])


def branches(children):
    lists = st.lists(children, min_size=1, max_size=3)
    return (
        lists | lists.map(tuple) | st.dictionaries(st.sampled_from("abcd"), children, min_size=1, max_size=3)
    )


def scalars(tree):
    return sum(leaf.size for leaf in optree.tree_leaves(tree))


shapes = st.sampled_from([(), (0,), (1,), (2,), (3,), (2, 2), (2, 0)])
trees = st.recursive(shapes.map(onp.zeros) | st.none(), branches, max_leaves=5)
skeletons = trees.filter(lambda tree: 1 <= scalars(tree) <= 12)
seeds = st.integers(0, 2**32 - 1)


# Two families of costs. In both λ shapes the curvature, the gradient and, directly, the judgement.


def quadratic(theta, lam, batch):
    curvature = np.sum((batch["A"] @ theta) ** 2) + np.sum(np.exp(batch["L"] @ lam) * theta**2)
    return 0.5 * curvature - np.sum((batch["b"] + batch["N"] @ np.sin(lam)) * theta)


def quadratic_outer(theta, lam, batch):
    return 0.5 * np.sum((batch["A"] @ theta - batch["b"]) ** 2) + np.sum(batch["d"] * lam**2)


def layers(theta):
    """Weights, biases and output weights of a hidden layer; those that θ is too short for are 1."""
    missing = onp.ones(-len(theta) % 3, theta.dtype)
    return np.reshape(np.concatenate([theta, missing]), (3, -1))


def network(theta, x):
    a, b, c = layers(theta)
    return np.tanh(x[:, None] * a + b) @ c


def mlp(theta, lam, batch):
    """Squared error with input noise of learned strength, and an L2 penalty for each layer."""
    x = batch["x"] + np.exp(np.sum(batch["N"] * lam)) * batch["noise"]
    penalty = np.sum(np.exp(batch["L"] @ lam)[:, None] * layers(theta) ** 2)
    return np.mean((network(theta, x) - batch["y"]) ** 2) + 0.1 * penalty


def mlp_outer(theta, lam, batch):
    return np.mean((network(theta, batch["x"]) - batch["y"]) ** 2) + np.sum(batch["d"] * lam**2)


def quadratic_batch(rng, n, m):
    return {
        "A": rng.normal(size=(n, n)) / n**0.5,
        "b": rng.normal(size=n),
        "L": 0.5 * rng.normal(size=(n, m)) / m**0.5,
        "N": rng.normal(size=(n, m)) / m**0.5,
        "d": rng.normal(size=m),
    }


def mlp_batch(rng, n, m):
    return {
        "x": rng.normal(size=5),
        "y": rng.normal(size=5),
        "noise": 0.3 * rng.normal(size=5),
        "L": 0.5 * rng.normal(size=(3, m)) / m**0.5,
        "N": 0.5 * rng.normal(size=m) / m**0.5,
        "d": rng.normal(size=m),
    }


FAMILIES = {"quadratic": (quadratic, quadratic_outer, quadratic_batch), "mlp": (mlp, mlp_outer, mlp_batch)}


class Drawn(NamedTuple):
    inner: Callable[..., Any]
    outer: Callable[..., Any]
    theta: Any
    lam: Any
    params: Any
    hparams: Any
    train: list[Any]
    val: Any

    @property
    def bilevel(self):
        return hg.Bilevel(lift(self.inner), lift(self.outer))

    def mean(self, theta, lam, batches):
        return sum(self.inner(theta, lam, batch) for batch in batches) / len(batches)


@st.composite
def problems(draw, families=("quadratic", "mlp"), params=skeletons, hparams=skeletons):
    inner, outer, batch = FAMILIES[draw(st.sampled_from(families))]
    params, hparams, rng = draw(params), draw(hparams), onp.random.default_rng(draw(seeds))
    n, m = scalars(params), scalars(hparams)
    theta, lam = rng.normal(size=n), 0.7 * rng.normal(size=m)
    train = [batch(rng, n, m) for _ in range(T)]
    return Drawn(inner, outer, theta, lam, cut(theta, params), cut(lam, hparams), train, batch(rng, n, m))


def lift(cost):
    return lambda params, hparams, batch: cost(flat(params), flat(hparams), batch)


def estimate(p, estimator, state=None, **changes):
    """Train on one batch a step; `Implicit` takes their mean."""
    p = p._replace(**changes)
    train = p.train if isinstance(estimator, hg.Implicit) else lambda t: p.train[t % len(p.train)]
    state = state or estimator.init(p.bilevel, p.params, p.hparams)
    return estimator.estimate(p.bilevel, state, p.hparams, train, p.val)


def hypergradient(p, estimator, state=None, **changes):
    return estimate(p, estimator, state, **changes).hypergradient


def agree(x, y, tolerance):
    x, y = flat(x), flat(y)
    assert x.shape == y.shape
    assert onp.linalg.norm(x - y) <= tolerance * (1 + onp.linalg.norm(y))


# Update rules, as the library and as the textbook have them; some of their constants depend on λ.


def rate(lam):
    return 0.05 * np.exp(0.3 * np.sin(np.sum(lam)))


def share(lam):
    return 0.8 + 0.1 * np.cos(np.sum(lam))


class Rule(NamedTuple):
    kind: Callable[..., Any]
    map: Callable[..., Any]
    copies: int
    constants: dict[str, Any]

    @property
    def update(self):
        tree = {k: (lambda h, f=f: f(flat(h))) if callable(f) else f for k, f in self.constants.items()}
        return self.kind(**tree)


adamw_map = partial(textbook.adam_map, decoupled=True)
RULES = {
    "sgd": Rule(hg.SGD, textbook.sgd_map, 0, {"lr": 0.1}),
    "sgd-decay": Rule(hg.SGD, textbook.sgd_map, 0, {"lr": rate, "weight_decay": share}),
    "momentum": Rule(hg.SGD, textbook.sgd_map, 1, {"lr": rate, "momentum": share}),
    "nesterov": Rule(
        hg.SGD, textbook.sgd_map, 1, {"lr": 0.05, "momentum": share, "nesterov": True, "weight_decay": rate}
    ),
    "adam": Rule(hg.Adam, textbook.adam_map, 2, {"lr": rate, "beta1": share, "beta2": 0.9, "eps": 0.1}),
    "adam-decay": Rule(hg.Adam, textbook.adam_map, 2, {"lr": 0.1, "eps": 0.1, "weight_decay": share}),
    "adamw": Rule(hg.AdamW, adamw_map, 2, {"lr": rate, "beta2": share, "eps": 0.1, "weight_decay": share}),
    "rmsprop": Rule(hg.RMSprop, textbook.rmsprop_map, 1, {"lr": rate, "alpha": share, "eps": 0.1}),
    "rmsprop-momentum": Rule(
        hg.RMSprop,
        textbook.rmsprop_map,
        2,
        {"lr": 0.05, "alpha": 0.9, "eps": 0.1, "momentum": share, "weight_decay": rate},
    ),
}
rules = st.sampled_from(list(RULES.values()))
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

SGD, ADAM = hg.SGD(0.05, momentum=0.9), hg.Adam(0.05, eps=0.1)
definite = partial(hg.Implicit, damping=20.0, tolerance=float("inf"))
estimators = st.sampled_from(
    [
        *(hg.Greedy(ADAM), hg.Greedy(SGD, response="gradient"), hg.Greedy(SGD, lookahead=False)),
        *(hg.Unrolled(SGD, T), hg.Unrolled(ADAM, T, truncate=2), hg.Unrolled(RULES["rmsprop"].update, T)),
        *(hg.Unrolled(ADAM, T, tape=hg.States()), definite(hg.Direct()), definite(hg.Identity())),
        *(definite(hg.CG(rtol=1e-5)), definite(hg.Neumann(4, 0.01))),
    ]
)


class TestTextbook:
    """The dense formulas, to 1e-10."""

    @hundred
    @given(problems(), st.booleans())
    def test_greedy(self, p, lookahead):
        at = (p.inner, p.outer, p.theta, p.lam, p.train[0], p.val)
        agree(
            hypergradient(p, hg.Greedy(hg.SGD(0.1), lookahead=lookahead)),
            textbook.greedy(*at, eta=0.1, lookahead=lookahead),
            1e-10,
        )

    @hundred
    @given(problems(), st.booleans())
    def test_greedy_to_the_letter(self, p, lookahead):
        at = (p.inner, p.outer, p.theta, p.lam, p.train[0], p.val)
        estimator = hg.Greedy(hg.SGD(0.1), response="gradient", lookahead=lookahead)
        agree(hypergradient(p, estimator), textbook.greedy_literal(*at, lookahead=lookahead, eta=0.1), 1e-10)

    @every_rule
    @hundred
    @given(p=problems(), truncate=st.sampled_from([None, 1, 2]))
    def test_unrolled(self, rule, p, truncate):
        n, Phi = len(p.theta), rule.map(p.inner, len(p.theta), **rule.constants)
        z = onp.concatenate([p.theta, onp.zeros(rule.copies * n)])
        out = estimate(p, hg.Unrolled(rule.update, T, truncate=truncate))
        agree(out.state.params, textbook.trajectory(Phi, z, p.lam, p.train)[T][:n], 1e-10)
        expected = textbook.unrolled(Phi, p.outer, z, p.lam, p.train, p.val, n, truncate)
        agree(out.hypergradient, expected, 1e-10)

    @hundred
    @given(problems(["quadratic"]))
    def test_implicit(self, p):
        estimator = hg.Implicit(hg.Direct(), tolerance=float("inf"))
        expected = textbook.implicit(p.mean, p.outer, p.theta, p.lam, p.train, p.val)
        agree(hypergradient(p, estimator), expected, 1e-10)

    @hundred
    @given(problems(), st.floats(0.1, 10.0))
    def test_implicit_with_damping(self, p, margin):
        lowest = onp.linalg.eigvalsh(textbook.hessian(p.mean, p.theta, p.lam, p.train))[0]
        damping = margin + max(0.0, -float(lowest))
        expected = textbook.implicit(p.mean, p.outer, p.theta, p.lam, p.train, p.val, damping)
        agree(hypergradient(p, definite(hg.Direct(), damping=damping)), expected, 1e-10)

    @hundred
    @given(problems())
    def test_the_iterates_of_conjugate_gradients(self, p):
        H = textbook.hessian(p.inner, p.theta, p.lam, p.train[0])
        H, n = H @ H + onp.eye(len(H)), len(H)
        matvec = lambda x: cut(H @ flat(x), p.params)  # noqa: E731
        for k, x in enumerate(textbook.conjugate_gradients(H, p.theta, n), start=1):
            agree(hg.CG(max_steps=k, rtol=1e-15).solve(BACKEND, matvec, p.params).x, x, 1e-10)


class TestIdentities:
    """What the estimators must say about one another."""

    @every_rule
    @hundred
    @given(p=problems())
    def test_greedy_is_one_step_of_unrolled(self, rule, p):
        warm = estimate(p, hg.Unrolled(rule.update, 2)).state
        one, other = (estimate(p, e, warm) for e in (hg.Greedy(rule.update), hg.Unrolled(rule.update, 1)))
        agree(one.hypergradient, other.hypergradient, 1e-12)
        agree(one.state, other.state, 1e-12)

    @hundred
    @given(problems(), rules, st.integers(T, 2 * T))
    def test_truncation_beyond_the_start_is_none(self, p, rule, truncate):
        full, truncated = hg.Unrolled(rule.update, T), hg.Unrolled(rule.update, T, truncate=truncate)
        agree(hypergradient(p, truncated), hypergradient(p, full), 1e-12)

    @hundred
    @given(problems(), rules, st.sampled_from([None, 1, 2]))
    def test_a_tape_of_states_is_as_good_as_a_full_one(self, p, rule, truncate):
        full, states = (hg.Unrolled(rule.update, T, truncate, tape) for tape in (hg.Full(), hg.States()))
        agree(hypergradient(p, states), hypergradient(p, full), 1e-12)

    @hundred
    @given(problems(["quadratic"]), st.integers(1, 5), st.integers(0, 2))
    def test_neumann_terms_at_a_fixed_point_are_the_last_steps(self, p, terms, more):
        p = at_optimum(p._replace(train=p.train[:1]))
        series = hypergradient(p, hg.Implicit(hg.Neumann(terms, step_size=0.1)))
        agree(series, hypergradient(p, hg.Unrolled(hg.SGD(0.1), terms + more, truncate=terms)), 1e-10)
        at = (p.inner, p.outer, p.theta, p.lam, p.train[0], p.val)
        agree(series, textbook.neumann(*at, eta=0.1, terms=terms), 1e-10)

    @hundred
    @given(problems(["quadratic"]))
    def test_solvers_that_converge_are_direct(self, p):
        direct, cg, neumann = (
            hypergradient(p, hg.Implicit(solver, tolerance=float("inf")))
            for solver in (hg.Direct(), hg.CG(rtol=1e-10), hg.Neumann(5000, rtol=1e-10))
        )
        agree(cg, direct, 1e-8)
        agree(neumann, direct, 1e-8)

    @hundred
    @given(problems(), estimators, st.floats(-3, 3), st.floats(-3, 3))
    def test_linear_in_the_validation_loss(self, p, estimator, a, b):
        def other(theta, lam, batch):
            return np.sum(np.sin(theta)) + np.sum(np.cos(lam))

        def both(theta, lam, batch):
            return a * p.outer(theta, lam, batch) + b * other(theta, lam, batch)

        parts = [a * flat(hypergradient(p, estimator)), b * flat(hypergradient(p, estimator, outer=other))]
        tolerance = 1e-4 if "CG" in repr(estimator) else 1e-12  # as far as CG was asked to go
        agree(hypergradient(p, estimator, outer=both), sum(parts), tolerance)

    @hundred
    @given(problems(), estimators)
    def test_indifferent_to_how_a_vector_is_cut_into_leaves(self, p, estimator):
        whole = hypergradient(p, estimator, params=p.theta, hparams=p.lam)
        agree(hypergradient(p, estimator), whole, 1e-12)


def at_optimum(p):
    """Train to the end: a quadratic has its minimum where one Newton step leads."""
    gradient = textbook.nabla_theta(p.mean, 0 * p.theta, p.lam, p.train)
    theta = -onp.linalg.solve(textbook.hessian(p.mean, p.theta, p.lam, p.train), gradient)
    return p._replace(theta=theta, params=cut(theta, p.params))


class TestClosedForm:
    @hundred
    @given(skeletons, seeds)
    def test_ridge_regression_with_a_penalty_for_each_feature(self, skeleton, seed):
        rng, n = onp.random.default_rng(seed), scalars(skeleton)
        (X1, y1), (X2, y2) = ((rng.normal(size=(8, n)), rng.normal(size=8)) for _ in range(2))
        lam = rng.normal(size=n)

        def ridge(theta, lam, batch):
            X, y = batch
            return 0.5 * np.mean((X @ theta - y) ** 2) + 0.5 * np.sum(np.exp(lam) * theta**2)

        def error(theta, lam, batch):
            X, y = batch
            return 0.5 * np.mean((X @ theta - y) ** 2)

        H = X1.T @ X1 / 8 + onp.diag(onp.exp(lam))
        theta = onp.linalg.solve(H, X1.T @ y1 / 8)
        p = Drawn(ridge, error, theta, lam, cut(theta, skeleton), cut(lam, skeleton), [(X1, y1)], (X2, y2))
        expected = -onp.exp(lam) * theta * onp.linalg.solve(H, X2.T @ (X2 @ theta - y2) / 8)
        agree(hypergradient(p, hg.Implicit(hg.Direct())), expected, 1e-10)
        agree(hypergradient(p, hg.Implicit(hg.CG(rtol=1e-12))), expected, 1e-10)

    @pytest.mark.parametrize("rule", [hg.Adam, partial(hg.AdamW, weight_decay=0.0), hg.RMSprop])
    @hundred
    @given(skeleton=skeletons, seed=seeds, steps=st.integers(1, 3))
    def test_a_gradient_of_exactly_zero(self, rule, skeleton, seed, steps):
        # C̃1 = λᵀθ at λ = 0: each step is −η λ / (|λ| + ε) up to O(λ²), whatever the betas.
        problem = hg.Bilevel(
            lift(lambda theta, lam, c: np.sum(lam * theta)), lift(lambda t, h, c: np.sum(c * t))
        )
        rng, lam = onp.random.default_rng(seed), onp.zeros(scalars(skeleton))
        theta, c = rng.normal(size=lam.size), rng.normal(size=lam.size)
        for estimator in (hg.Unrolled(rule(lr=0.1, eps=0.01), steps), hg.Greedy(rule(lr=0.1, eps=0.01))):
            at = (problem, cut(theta, skeleton), cut(lam, skeleton), lambda t: None, c)
            agree(hg.hypergradient(*at, estimator), -estimator.training_steps * 10.0 * c, 1e-12)


class TestDifferences:
    """Central differences of real training, to 1e-6."""

    @hundred
    @given(problems(), rules)
    def test_greedy(self, p, rule):
        at = (p.bilevel, p.params, p.hparams, p.train[0], p.val)
        check = hg.check_hypergradient(*at, hg.Greedy(rule.update), directions=2)
        agree(check.estimate, check.differences, 1e-6)
        agree(check.differences + check.uncertainty, check.differences, 1e-6)

    CONSTANTS = {
        hg.SGD: {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.2},
        hg.Adam: {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "weight_decay": 0.2, "eps": 0.1},
        hg.AdamW: {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "weight_decay": 0.2, "eps": 0.1},
        hg.RMSprop: {"lr": 0.1, "alpha": 0.8, "momentum": 0.7, "weight_decay": 0.2, "eps": 0.1},
    }

    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("kind", CONSTANTS)
    def test_of_the_constants_of_training_and_of_data_weights(self, kind, nesterov):
        if nesterov and kind is not hg.SGD:
            pytest.skip("SGD only")
        learned = {name: (lambda h, name=name: h[name]) for name in self.CONSTANTS[kind]}
        update = kind(**learned, **({"nesterov": True} if nesterov else {}))
        rng = onp.random.default_rng(0)
        train, val = ({"x": rng.normal(size=6), "y": rng.normal(size=6)} for _ in range(2))

        def squares(p, batch):
            return (network(p["w"], batch["x"]) - batch["y"]) ** 2

        problem = hg.Bilevel(
            lambda p, h, b: np.sum(h["weights"] * squares(p, b)), lambda p, h, b: np.mean(squares(p, b))
        )
        params = {"w": rng.normal(size=6)}
        hparams = {k: onp.array(x) for k, x in self.CONSTANTS[kind].items()} | {
            "weights": rng.uniform(size=6)
        }
        at = (problem, params, hparams, lambda t: train, val)
        for estimator in (
            hg.Greedy(update),
            hg.Unrolled(update, 4),
            hg.Unrolled(update, 4, tape=hg.States()),
        ):
            check = hg.check_hypergradient(*at, estimator)
            assert check.relative_error <= 1e-6
            assert check.difference_error <= 1e-6
            assert check.exact_relative_error <= 1e-10

        # The first step knows no momentum. The one after the fourth does, and every constant matters.
        greedy, (warm, flat_h) = (
            hg.Greedy(update),
            (estimate_at(hg.Unrolled(update, 4), at).state, flat(hparams)),
        )
        out = estimate_at(greedy, at, warm)
        value = lambda h: float(estimate_at(greedy, (*at[:2], cut(h, hparams), *at[3:]), warm).outer_value)  # noqa: E731
        axes = onp.eye(flat_h.size)
        slopes = [ridders(lambda s, e=e: value(flat_h + s * e), 0.05)[0] for e in axes]
        agree(out.hypergradient, onp.array(slopes), 1e-6)
        assert onp.all(onp.abs(flat(out.hypergradient)) > 1e-6)


def estimate_at(estimator, at, state=None):
    problem, params, hparams, train, val = at
    return estimator.estimate(problem, state or estimator.init(problem, params, hparams), hparams, train, val)


class TestSpaces:
    """dC2/du = (∂λ/∂u)ᵀ dC2/dλ."""

    kinds = st.sampled_from(
        [
            hg.Real(),
            hg.Positive(),
            hg.Positive("softplus"),
            hg.NonNegative(),
            hg.Interval(-1.0, 2.0),
            hg.Simplex(),
        ]
    )

    @hundred
    @given(problems(), st.data())
    def test_chain_rule(self, p, data):
        def kind(leaf):  # a simplex needs an axis to sum over
            found = data.draw(self.kinds)
            return hg.Real() if found == hg.Simplex() and 0 in (leaf.ndim, leaf.size) else found

        space = spaces.spread(BACKEND, optree.tree_map(kind, p.hparams), p.hparams)
        free = optree.tree_map(lambda s, u: abs(u) if s == hg.NonNegative() else u, space, p.hparams)
        constrain = partial(spaces.constrain, BACKEND, space)
        hparams = constrain(free)
        agree(constrain(spaces.unconstrain(BACKEND, space, hparams)), hparams, 1e-12)

        chained = spaces.chain(BACKEND, space, free, hypergradient(p, hg.Greedy(SGD), hparams=hparams))
        composed = hg.Bilevel(
            lambda theta, u, b: p.bilevel.inner(theta, constrain(u), b),
            lambda theta, u, b: p.bilevel.outer(theta, constrain(u), b),
        )
        at = (composed, p.params, free, p.train[0], p.val)
        agree(chained, hg.hypergradient(*at, hg.Greedy(SGD)), 1e-12)
        check = hg.check_hypergradient(*at, hg.Greedy(SGD), directions=1)
        agree(check.estimate, check.differences, 1e-6)


class TestManners:
    @hundred
    @given(problems(), estimators)
    def test_float32_in_float32_out(self, p, estimator):
        single = partial(optree.tree_map, lambda x: onp.asarray(x, onp.float32))
        changes = {name: single(getattr(p, name)) for name in ("params", "hparams", "train", "val")}
        out = estimate(p, estimator, **changes)
        leaves = optree.tree_leaves((out.hypergradient, out.state.params, out.state.opt_state))
        assert {onp.asarray(leaf).dtype for leaf in leaves} == {onp.dtype(onp.float32)}
        agree(out.hypergradient, hypergradient(p, estimator), 1e-3)

    @hundred
    @given(problems(), estimators)
    def test_what_is_given_is_left_as_it_was(self, p, estimator):
        state = estimator.init(p.bilevel, p.params, p.hparams)
        given = pickle.dumps((p.params, p.hparams, p.train, p.val, state))
        first = estimate(p, estimator, state)
        assert pickle.dumps((p.params, p.hparams, p.train, p.val, state)) == given
        again = estimate(p, estimator, state)
        assert flat(again.hypergradient).tobytes() == flat(first.hypergradient).tobytes()
