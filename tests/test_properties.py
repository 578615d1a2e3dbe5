"""The algebra on random problems: every identity that the estimators promise, and who else agrees.

A problem is drawn twice over: as a cost of flat vectors, which the dense formulas of the textbook
read, and as the same cost of random trees, which the library reads. Everything random is in the batch.
"""

import pickle
from collections import namedtuple
from functools import partial

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

PROFILE = settings(max_examples=100, derandomize=True, deadline=None, database=None)
BACKEND, T = get_backend("numpy"), 3


def hundred(*args, **kwargs):
    """A property of whatever is drawn, tried on a hundred examples."""
    profile = settings(PROFILE, suppress_health_check=[HealthCheck.too_slow])
    return lambda test: profile(given(*args, **kwargs)(test))


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
    dicts = st.dictionaries(st.sampled_from("abcd"), children, min_size=1, max_size=3)
    return lists | lists.map(tuple) | dicts


shapes = st.sampled_from([(), (0,), (1,), (2,), (3,), (2, 2), (2, 0)])
trees = st.recursive(shapes.map(onp.zeros) | st.none(), branches, max_leaves=5)
skeletons = trees.filter(lambda tree: 1 <= sum(leaf.size for leaf in optree.tree_leaves(tree)) <= 6)
seeds = st.integers(0, 2**32 - 1)


# Two families of costs. In both λ shapes the curvature, the gradient and, directly, the judgement.
def quadratic(theta, lam, batch):
    n = len(theta)
    curvature = np.sum((batch["A"] @ theta) ** 2) + np.sum(np.exp(batch["L"][:n] @ lam) * theta**2)
    return 0.5 * curvature - np.sum((batch["b"] + batch["N"][:n] @ np.sin(lam)) * theta)


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
    x = batch["x"] + np.exp(batch["N"][0] @ lam) * batch["noise"]
    penalty = np.sum(np.exp(batch["L"][:3] @ lam)[:, None] * layers(theta) ** 2)
    return np.mean((network(theta, x) - batch["y"]) ** 2) + 0.1 * penalty


def mlp_outer(theta, lam, batch):
    return np.mean((network(theta, batch["x"]) - batch["y"]) ** 2) + np.sum(batch["d"] * lam**2)


def draw_batch(rng, n, m):
    x, y, noise = rng.normal(size=(3, 5))
    L, N = (rng.normal(size=(max(n, 3), m)) / m**0.5 for _ in range(2))
    A, b, d = rng.normal(size=(n, n)) / n**0.5, rng.normal(size=n), rng.normal(size=m)
    return {"A": A, "b": b, "d": d, "L": 0.5 * L, "N": 0.5 * N, "x": x, "y": y, "noise": 0.3 * noise}


FAMILIES = {"quadratic": (quadratic, quadratic_outer), "mlp": (mlp, mlp_outer)}


class Drawn(namedtuple("Drawn", "inner outer theta lam params hparams train val")):
    @property
    def bilevel(self):
        return hg.Bilevel(*(lambda p, h, b, f=f: f(flat(p), flat(h), b) for f in (self.inner, self.outer)))

    @property
    def vectors(self):
        return self.inner, self.outer, self.theta, self.lam, self.train[0], self.val

    def mean(self, theta, lam, batches):
        return sum(self.inner(theta, lam, batch) for batch in batches) / len(batches)


@st.composite
def problems(draw, *families):
    inner, outer = FAMILIES[draw(st.sampled_from(families or list(FAMILIES)))]
    params, hparams, rng = draw(skeletons), draw(skeletons), onp.random.default_rng(draw(seeds))
    n, m = flat(params).size, flat(hparams).size
    theta, lam = rng.normal(size=n), 0.7 * rng.normal(size=m)
    *train, val = (draw_batch(rng, n, m) for _ in range(T + 1))
    return Drawn(inner, outer, theta, lam, cut(theta, params), cut(lam, hparams), train, val)


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
rate, share = (lambda lam, c=c: c * (1 + 0.1 * np.sin(np.sum(lam))) for c in (0.05, 0.8))


class Rule(namedtuple("Rule", "kind map copies constants")):
    @property
    def update(self):
        read = {k: (lambda h, f=f: f(flat(h))) if callable(f) else f for k, f in self.constants.items()}
        return self.kind(**read)

    def on(self, p):
        """The textbook's update map and first state: θ, and zeros for each copy that the rule keeps."""
        n = p.theta.size
        return self.map(p.inner, n, **self.constants), onp.concatenate([p.theta, onp.zeros(self.copies * n)])


sgd, adam, rmsprop = textbook.sgd_map, textbook.adam_map, textbook.rmsprop_map
adamw = partial(adam, decoupled=True)
RULES = {
    "sgd": Rule(hg.SGD, sgd, 0, {"lr": rate, "weight_decay": share}),
    "momentum": Rule(hg.SGD, sgd, 1, {"lr": rate, "momentum": share}),
    "nesterov": Rule(hg.SGD, sgd, 1, {"lr": 0.05, "momentum": share, "nesterov": True, "weight_decay": rate}),
    "adam": Rule(
        hg.Adam, adam, 2, {"lr": rate, "beta1": share, "beta2": 0.9, "eps": 0.1, "weight_decay": rate}
    ),
    "adamw": Rule(hg.AdamW, adamw, 2, {"lr": rate, "beta2": share, "eps": 0.1, "weight_decay": share}),
    "rmsprop": Rule(hg.RMSprop, rmsprop, 1, {"lr": rate, "alpha": share, "eps": 0.1, "weight_decay": rate}),
    "rmsprop-momentum": Rule(hg.RMSprop, rmsprop, 2, {"lr": rate, "eps": 0.1, "momentum": share}),
}
rules = st.sampled_from(list(RULES.values()))
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

SGD, ADAM = hg.SGD(0.05, momentum=0.9), hg.Adam(0.05, eps=0.1)
anywhere = partial(hg.Implicit, tolerance=float("inf"))
definite = partial(anywhere, damping=20.0)
LINEAR = [
    *(hg.Greedy(ADAM), hg.Greedy(SGD, response="gradient"), hg.Greedy(SGD, lookahead=False)),
    *(hg.Unrolled(SGD, T), hg.Unrolled(ADAM, T, truncate=2), hg.Unrolled(ADAM, T, tape=hg.States())),
    *(hg.Unrolled(RULES["rmsprop"].update, T), definite(hg.Direct()), definite(hg.Neumann(4, 0.01))),
]
linear_estimators = st.sampled_from([*LINEAR, definite(hg.Identity())])
estimators = st.sampled_from([*LINEAR, definite(hg.CG(rtol=1e-5))])


class TestTextbook:  # the dense formulas, to 1e-10
    @hundred(problems(), st.booleans())
    def test_greedy(self, p, ahead):
        greedy = partial(hg.Greedy, hg.SGD(0.1), lookahead=ahead)
        letter = textbook.greedy_literal(*p.vectors, lookahead=ahead, eta=0.1)
        agree(hypergradient(p, greedy()), textbook.greedy(*p.vectors, eta=0.1, lookahead=ahead), 1e-10)
        agree(hypergradient(p, greedy(response="gradient")), letter, 1e-10)

    @every_rule
    @hundred(p=problems(), truncate=st.sampled_from([None, 1, 2]))
    def test_unrolled(self, rule, p, truncate):
        n, (Phi, z) = p.theta.size, rule.on(p)
        out = estimate(p, hg.Unrolled(rule.update, T, truncate=truncate))
        agree(out.state.params, textbook.trajectory(Phi, z, p.lam, p.train)[T][:n], 1e-10)
        expected = textbook.unrolled(Phi, p.outer, z, p.lam, p.train, p.val, n, truncate)
        agree(out.hypergradient, expected, 1e-10)

    @hundred(problems("quadratic"))
    def test_implicit(self, p):
        expected = textbook.implicit(p.mean, p.outer, p.theta, p.lam, p.train, p.val)
        agree(hypergradient(p, anywhere(hg.Direct())), expected, 1e-10)

    @hundred(problems(), st.floats(0.1, 10.0))
    def test_implicit_with_damping(self, p, margin):
        lowest = onp.linalg.eigvalsh(textbook.hessian(p.mean, p.theta, p.lam, p.train))[0]
        damping = margin + max(0.0, -float(lowest))
        expected = textbook.implicit(p.mean, p.outer, p.theta, p.lam, p.train, p.val, damping)
        agree(hypergradient(p, anywhere(hg.Direct(), damping=damping)), expected, 1e-10)

    @hundred(problems())
    def test_the_iterates_of_conjugate_gradients(self, p):
        H = textbook.hessian(p.inner, p.theta, p.lam, p.train[0])
        H, n = H @ H + onp.eye(len(H)), len(H)
        matvec = lambda x: cut(H @ flat(x), p.params)  # noqa: E731
        for k, x in enumerate(textbook.conjugate_gradients(H, p.theta, n), start=1):
            agree(hg.CG(max_steps=k, rtol=1e-15).solve(BACKEND, matvec, p.params).x, x, 1e-10)


class TestIdentities:  # what the estimators must say about one another
    @every_rule
    @hundred(p=problems())
    def test_greedy_is_one_step_of_unrolled(self, rule, p):
        warm = estimate(p, hg.Unrolled(rule.update, 2)).state
        one, other = (estimate(p, e, warm) for e in (hg.Greedy(rule.update), hg.Unrolled(rule.update, 1)))
        agree(one.hypergradient, other.hypergradient, 1e-12)
        agree(one.state, other.state, 1e-12)

    @hundred(problems(), rules, st.integers(0, T))
    def test_truncation_beyond_the_start_is_none(self, p, rule, more):
        full, truncated = hg.Unrolled(rule.update, T), hg.Unrolled(rule.update, T, truncate=T + more)
        agree(hypergradient(p, truncated), hypergradient(p, full), 1e-12)

    @hundred(problems(), rules, st.sampled_from([None, 1, 2]))
    def test_a_tape_of_states_is_as_good_as_a_full_one(self, p, rule, truncate):
        full, states = (hg.Unrolled(rule.update, T, truncate, tape) for tape in (hg.Full(), hg.States()))
        agree(hypergradient(p, states), hypergradient(p, full), 1e-12)

    @hundred(problems("quadratic"), st.integers(1, 5), st.integers(0, 2))
    def test_neumann_terms_at_a_fixed_point_are_the_last_steps(self, p, terms, more):
        at = (p.inner, p.theta, p.lam, p.train[0])  # a quadratic's minimum is one Newton step away
        theta = p.theta - onp.linalg.solve(textbook.hessian(*at), textbook.nabla_theta(*at))
        p = p._replace(train=p.train[:1], theta=theta, params=cut(theta, p.params))
        series = hypergradient(p, hg.Implicit(hg.Neumann(terms, step_size=0.1)))
        agree(series, hypergradient(p, hg.Unrolled(hg.SGD(0.1), terms + more, truncate=terms)), 1e-10)
        agree(series, textbook.neumann(*p.vectors, eta=0.1, terms=terms), 1e-10)

    @hundred(problems("quadratic"))
    def test_solvers_that_converge_are_direct(self, p):
        direct = hypergradient(p, anywhere(hg.Direct()))
        for solver in (hg.CG(rtol=1e-10), hg.Neumann(5000, rtol=1e-10)):
            agree(hypergradient(p, anywhere(solver)), direct, 1e-8)

    @hundred(problems(), linear_estimators, st.floats(-3, 3), st.floats(-3, 3))
    def test_linear_in_the_validation_loss(self, p, estimator, a, b):
        other = lambda theta, lam, _: np.sum(np.sin(theta)) + np.sum(np.cos(lam))  # noqa: E731
        both = lambda *at: a * p.outer(*at) + b * other(*at)  # noqa: E731
        parts = [a * flat(hypergradient(p, estimator)), b * flat(hypergradient(p, estimator, outer=other))]
        agree(hypergradient(p, estimator, outer=both), sum(parts), 1e-12)

    @hundred(problems(), estimators)
    def test_indifferent_to_how_a_vector_is_cut_into_leaves(self, p, estimator):
        whole = hypergradient(p, estimator, params=p.theta, hparams=p.lam)
        agree(hypergradient(p, estimator), whole, 1e-12)


class TestClosedForm:
    @hundred(skeletons, seeds)
    def test_ridge_regression_with_a_penalty_for_each_feature(self, skeleton, seed):
        rng, n = onp.random.default_rng(seed), flat(skeleton).size
        X1, X2, y1, y2, lam = (rng.normal(size=size) for size in ((8, n), (8, n), 8, 8, n))

        def error(theta, lam, batch):
            return 0.5 * np.mean((batch[0] @ theta - batch[1]) ** 2)

        def ridge(theta, lam, batch):
            return error(theta, lam, batch) + 0.5 * np.sum(np.exp(lam) * theta**2)

        H = X1.T @ X1 / 8 + onp.diag(onp.exp(lam))
        theta = onp.linalg.solve(H, X1.T @ y1 / 8)
        p = Drawn(ridge, error, theta, lam, cut(theta, skeleton), cut(lam, skeleton), [(X1, y1)], (X2, y2))
        expected = -onp.exp(lam) * theta * onp.linalg.solve(H, X2.T @ (X2 @ theta - y2) / 8)
        agree(hypergradient(p, hg.Implicit(hg.Direct())), expected, 1e-10)
        agree(hypergradient(p, hg.Implicit(hg.CG(rtol=1e-12))), expected, 1e-10)

    @pytest.mark.parametrize("rule", [hg.Adam, partial(hg.AdamW, weight_decay=0.0), hg.RMSprop])
    @hundred(skeleton=skeletons, seed=seeds, steps=st.integers(1, 3))
    def test_a_gradient_of_exactly_zero(self, rule, skeleton, seed, steps):
        # C̃1 = λᵀθ at λ = 0: each step is −η λ / (|λ| + ε) up to O(λ²), whatever the betas.
        rng, lam = onp.random.default_rng(seed), onp.zeros(flat(skeleton).size)
        theta, c = rng.normal(size=(2, lam.size))
        costs = (lambda theta, lam, _: lam @ theta, lambda theta, lam, c: c @ theta)
        p = Drawn(*costs, theta, lam, cut(theta, skeleton), cut(lam, skeleton), [None], c)
        for estimator in (hg.Unrolled(rule(lr=0.1, eps=0.01), steps), hg.Greedy(rule(lr=0.1, eps=0.01))):
            agree(hypergradient(p, estimator), -estimator.training_steps * 10.0 * c, 1e-12)


class TestDifferences:  # central differences of real training, to 1e-6
    # From a standstill Adam and RMSprop step along g/|g|, which has a kink where g = 0: so they start warm,
    # or where no gradient is near zero.

    @hundred(problems(), rules, seeds)
    def test_greedy(self, p, rule, seed):
        Phi, z = rule.on(p)
        z = textbook.trajectory(Phi, z, p.lam, p.train[:2])[2]
        direction = onp.random.default_rng(seed).normal(size=p.lam.size)

        def trained(h):
            lam = p.lam + h * direction
            return p.outer(Phi(z, lam, p.train[2], 2)[: p.theta.size], lam, p.val)

        slope, doubt = ridders(trained, 0.05)
        warm = estimate(p, hg.Unrolled(rule.update, 2)).state
        assert doubt <= 1e-6 * (1 + abs(slope))
        agree(flat(hypergradient(p, hg.Greedy(rule.update), warm)) @ direction, slope, 1e-6)

    LEARNED = {
        "sgd": (hg.SGD, {"momentum": 0.8}),
        "nesterov": (partial(hg.SGD, nesterov=True), {"momentum": 0.8}),
        "adam": (hg.Adam, {"beta1": 0.7, "beta2": 0.9, "eps": 0.1}),
        "adamw": (hg.AdamW, {"beta1": 0.7, "beta2": 0.9, "eps": 0.1}),
        "rmsprop": (hg.RMSprop, {"alpha": 0.8, "momentum": 0.7, "eps": 0.1}),
    }

    @pytest.mark.parametrize(("kind", "constants"), LEARNED.values(), ids=LEARNED)
    def test_of_the_constants_of_training_and_of_data_weights(self, kind, constants):
        constants = {"lr": 0.1, "weight_decay": 0.2} | constants
        update = kind(**{name: (lambda h, name=name: h[name]) for name in constants})
        rng = onp.random.default_rng(0)
        theta, (train, val) = rng.uniform(size=6), rng.uniform(0.5, 1.5, size=(2, 2, 6))
        hparams = {name: onp.array(x) for name, x in constants.items()} | {"weights": rng.uniform(size=6)}

        def loss(theta, batch):  # targets above all outputs, so that each gradient has one sign
            return (network(theta, batch[0]) - batch[1] - 4.0) ** 2

        problem = hg.Bilevel(lambda t, h, b: h["weights"] @ loss(t, b), lambda t, h, b: np.mean(loss(t, b)))
        unrolled, greedy = hg.Unrolled(update, 4), hg.Greedy(update)
        for estimator in (greedy, unrolled, hg.Unrolled(update, 4, tape=hg.States())):
            check = hg.check_hypergradient(problem, theta, hparams, lambda t: train, val, estimator)
            assert max(check.relative_error, check.difference_error) <= 1e-6
            assert check.exact_relative_error <= 1e-10

        # The first step knows no momentum; the one after the fourth does, and there every constant matters.
        start, lam = unrolled.init(problem, theta, hparams), flat(hparams)
        warm = unrolled.estimate(problem, start, hparams, lambda t: train, val).state
        after = lambda lam: greedy.estimate(problem, warm, cut(lam, hparams), train, val)  # noqa: E731
        for axis, g in zip(onp.eye(lam.size), flat(after(lam).hypergradient), strict=True):
            slope, doubt = ridders(lambda h, axis=axis: float(after(lam + h * axis).outer_value), 0.05)
            assert max(abs(g - slope), doubt) <= 1e-6 * abs(slope)


KINDS = hg.Real(), hg.Positive(), hg.Positive("softplus"), hg.NonNegative(), hg.Interval(-1, 2), hg.Simplex()


class TestSpaces:  # dC2/du = (∂λ/∂u)ᵀ dC2/dλ
    @hundred(problems(), st.data())
    def test_chain_rule(self, p, data):
        def kind(leaf):  # a simplex needs an axis to sum over
            found = data.draw(st.sampled_from(KINDS))
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
    @hundred(problems(), estimators)
    def test_float32_in_float32_out(self, p, estimator):
        single = partial(optree.tree_map, lambda x: onp.asarray(x, onp.float32))
        changes = {name: single(getattr(p, name)) for name in ("params", "hparams", "train", "val")}
        out = estimate(p, estimator, **changes)
        leaves = optree.tree_leaves((out.hypergradient, out.state.params, out.state.opt_state))
        assert {onp.asarray(leaf).dtype for leaf in leaves} == {onp.dtype(onp.float32)}
        agree(out.hypergradient, hypergradient(p, estimator), 1e-3)

    @hundred(problems(), estimators)
    def test_what_is_given_is_left_as_it_was(self, p, estimator):
        state = estimator.init(p.bilevel, p.params, p.hparams)
        given = pickle.dumps((p.params, p.hparams, p.train, p.val, state))
        first = estimate(p, estimator, state)
        assert pickle.dumps((p.params, p.hparams, p.train, p.val, state)) == given
        again = estimate(p, estimator, state)
        assert flat(again.hypergradient).tobytes() == flat(first.hypergradient).tobytes()
