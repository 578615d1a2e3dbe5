"""The algebra on random problems: every identity that the estimators promise, and who else agrees.

A problem is drawn in NumPy, and its costs are written once, in the functions of a namespace `xp`. The
dense formulas of the textbook read them as costs of flat vectors, in autograd's NumPy; the library reads
them as costs of random trees, on each backend. Everything random is in the batch.
"""

from collections import namedtuple
from functools import partial, wraps

import autograd.numpy
import numpy as np
import optree
import pytest
from hypergrad_numpy import textbook
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import frameworks
from support.frameworks import NUMPY, affordable, beside_numpy, dear, each_backend, on_torch, program

import hypergrad as hg
from hypergrad import spaces
from hypergrad.check import ridders
from hypergrad.solvers import System

TOO_SLOW = [HealthCheck.too_slow]
MANY = settings(
    max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=TOO_SLOW
)
FEW = settings(MANY, max_examples=4, phases=[Phase.generate])  # what fails is not made smaller for minutes
T = 3


def hundred(*args, **kwargs):
    """A property of whatever is drawn, tried on a hundred examples, or as many as one can afford."""

    def decorate(test):
        many, few = (profile(given(*args, **kwargs)(test)) for profile in (MANY, FEW))

        @wraps(many)
        def on(*args, backend, **kwargs):
            affordable(backend, many, few)(*args, backend=backend, **kwargs)

        return on

    return decorate


# Trees: dicts, lists and tuples of scalars, vectors, matrices, empty arrays and None.
def flat(tree, backend=NUMPY):
    """All numbers of a tree of arrays, as one NumPy vector."""
    return np.concatenate([np.ravel(backend.to_numpy(leaf)) for leaf in optree.tree_leaves(tree)])


def cut(vector, skeleton):
    """The vector's entries in the shape of a tree."""
    leaves, spec = optree.tree_flatten(skeleton)
    parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return spec.unflatten([part.reshape(leaf.shape).copy() for part, leaf in zip(parts, leaves, strict=True)])


def branches(children):
    lists = st.lists(children, min_size=1, max_size=3)
    dicts = st.dictionaries(st.sampled_from("abcd"), children, min_size=1, max_size=3)
    return lists | lists.map(tuple) | dicts


shapes = st.sampled_from([(), (0,), (1,), (2,), (3,), (2, 2), (2, 0)])
trees = st.recursive(shapes.map(np.zeros) | st.none(), branches, max_leaves=5)
skeletons = trees.filter(lambda tree: 1 <= sum(leaf.size for leaf in optree.tree_leaves(tree)) <= 6)
seeds = st.integers(0, 2**32 - 1)


# Two families of costs. In both λ shapes the curvature, the gradient and, directly, the judgement.
def quadratic(xp, theta, lam, batch):
    n = len(theta)
    curvature = xp.sum((batch["A"] @ theta) ** 2) + xp.sum(xp.exp(batch["L"][:n] @ lam) * theta**2)
    return 0.5 * curvature - xp.sum((batch["b"] + batch["N"][:n] @ xp.sin(lam)) * theta)


def quadratic_outer(xp, theta, lam, batch):
    return 0.5 * xp.sum((batch["A"] @ theta - batch["b"]) ** 2) + xp.sum(batch["d"] * lam**2)


def layers(xp, theta):
    """Weights, biases and output weights of a hidden layer; a θ too short is read again from its start."""
    n = len(theta)
    return xp.reshape(theta[np.arange(n + -n % 3) % n], (3, -1))


def network(xp, theta, x):
    a, b, c = layers(xp, theta)
    return xp.tanh(x[:, None] * a + b) @ c


def mlp(xp, theta, lam, batch):
    """Squared error with input noise of learned strength, and an L2 penalty for each layer."""
    x = batch["x"] + xp.exp(batch["N"][0] @ lam) * batch["noise"]
    penalty = xp.sum(xp.exp(batch["L"][:3] @ lam)[:, None] * layers(xp, theta) ** 2)
    return xp.mean((network(xp, theta, x) - batch["y"]) ** 2) + 0.1 * penalty


def mlp_outer(xp, theta, lam, batch):
    return xp.mean((network(xp, theta, batch["x"]) - batch["y"]) ** 2) + xp.sum(batch["d"] * lam**2)


def draw_batch(rng, n, m):
    x, y, noise = rng.normal(size=(3, 5))
    L, N = (rng.normal(size=(max(n, 3), m)) / m**0.5 for _ in range(2))
    A, b, d = rng.normal(size=(n, n)) / n**0.5, rng.normal(size=n), rng.normal(size=m)
    return {"A": A, "b": b, "d": d, "L": 0.5 * L, "N": 0.5 * N, "x": x, "y": y, "noise": 0.3 * noise}


FAMILIES = {"quadratic": (quadratic, quadratic_outer), "mlp": (mlp, mlp_outer)}


class Drawn(namedtuple("Drawn", "inner outer theta lam params hparams train val compiled", defaults=[True])):
    """A problem, and whether a framework that compiles shall compile its estimates as a whole."""

    @property
    def costs(self):
        """Both costs of flat vectors, as the textbook differentiates them."""
        return [partial(cost, autograd.numpy) for cost in (self.inner, self.outer)]

    @property
    def vectors(self):
        return *self.costs, self.theta, self.lam, self.train[0], self.val

    def mean(self, theta, lam, batches):
        return sum(self.costs[0](theta, lam, batch) for batch in batches) / len(batches)

    def on(self, backend):
        """What the library takes: the costs of trees, parameters, hyperparameters, and both data sets."""

        def of_trees(cost):
            vector = lambda tree: backend.ravel(tree)[0]  # noqa: E731
            return lambda params, hparams, b: cost(backend.xp, vector(params), vector(hparams), b)

        data = (self.params, self.hparams, self.train, self.val)
        problem = hg.Bilevel(of_trees(self.inner), of_trees(self.outer))
        return problem, *(backend.map(backend.asarray, tree) for tree in data)


@st.composite
def problems(draw, *families):
    inner, outer = FAMILIES[draw(st.sampled_from(families or list(FAMILIES)))]
    params, hparams, rng = draw(skeletons), draw(skeletons), np.random.default_rng(draw(seeds))
    n, m = flat(params).size, flat(hparams).size
    theta, lam = rng.normal(size=n), 0.7 * rng.normal(size=m)
    *train, val = (draw_batch(rng, n, m) for _ in range(T + 1))
    trees = cut(theta, params), cut(lam, hparams)
    return Drawn(inner, outer, theta, lam, *trees, train, val, compiled=draw(st.booleans()))


def batches_for(estimator, backend, train):
    """One batch a step; `Implicit` takes their mean."""
    if isinstance(estimator, hg.Implicit):
        return train
    arrays = optree.tree_map(lambda *leaves: backend.xp.stack(leaves), *train)
    return lambda t: backend.map(lambda leaf: leaf[t % len(train)], arrays)


def estimate(backend, p, estimator, state=None, **changes):
    p = p._replace(**changes)
    problem, params, hparams, train, val = p.on(backend)
    state = state or estimator.init(problem, params, hparams)
    batches = {"train": batches_for(estimator, backend, train), "val": val}
    return frameworks.estimate(backend, estimator, problem, state, hparams, compiled=p.compiled, **batches)


def hypergradient(backend, *args, **changes):
    return flat(estimate(backend, *args, **changes).hypergradient, backend)


def agree(x, y, tolerance):
    assert x.shape == y.shape
    assert np.linalg.norm(x - y) <= tolerance * (1 + np.linalg.norm(y))


# Update rules, as the library and as the textbook have them; some of their constants depend on λ.
def total(tree):
    return sum(leaf.sum() for leaf in optree.tree_leaves(tree))


rate, share = (lambda lam, c=c: c * (1 + 0.1 / (1 + total(lam) ** 2)) for c in (0.05, 0.8))


class Rule(namedtuple("Rule", "kind map copies constants")):
    @property
    def update(self):
        return self.kind(**self.constants)

    def on(self, p):
        """The textbook's update map and first state: θ, and zeros for each copy that the rule keeps."""
        n = p.theta.size
        return self.map(p.costs[0], n, **self.constants), np.concatenate([p.theta, np.zeros(self.copies * n)])


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
FEW_RULES = {"momentum", "adamw", "rmsprop-momentum"}
every_rule = pytest.mark.parametrize(
    "rule", [rule if name in FEW_RULES else dear(rule) for name, rule in RULES.items()], ids=RULES
)

SGD, ADAM = hg.SGD(0.05, momentum=0.9), hg.Adam(0.05, eps=0.1)
anywhere = partial(hg.Implicit, tolerance=float("inf"))
definite = partial(anywhere, damping=20.0)
UNSOLVED = [
    *(hg.Greedy(ADAM), hg.Greedy(SGD, response="gradient"), hg.Greedy(SGD, lookahead=False)),
    *(hg.Unrolled(SGD, T), hg.Unrolled(ADAM, T, truncate=2), hg.Unrolled(ADAM, T, tape=hg.States())),
    *(hg.Unrolled(RULES["rmsprop"].update, T), definite(hg.Neumann(4, 0.01)), definite(hg.Identity())),
]
LINEAR = [*UNSOLVED, definite(hg.Direct())]
ESTIMATORS = [*LINEAR, definite(hg.CG(rtol=1e-5))]
without_promises, linear_estimators, estimators = map(st.sampled_from, (UNSOLVED, LINEAR, ESTIMATORS))


@each_backend
class TestTextbook:  # the dense formulas, to 1e-10
    @hundred(problems(), st.booleans())
    def test_greedy(self, backend, p, ahead):
        greedy = partial(hg.Greedy, hg.SGD(0.1), lookahead=ahead)
        letter = textbook.greedy_literal(*p.vectors, lookahead=ahead, eta=0.1)
        expected = textbook.greedy(*p.vectors, eta=0.1, lookahead=ahead)
        agree(hypergradient(backend, p, greedy()), expected, 1e-10)
        agree(hypergradient(backend, p, greedy(response="gradient")), letter, 1e-10)

    @every_rule
    @hundred(p=problems(), truncate=st.sampled_from([None, 1, 2]))
    def test_unrolled(self, backend, rule, p, truncate):
        n, (Phi, z) = p.theta.size, rule.on(p)
        out = estimate(backend, p, hg.Unrolled(rule.update, T, truncate=truncate))
        trained = textbook.trajectory(Phi, z, p.lam, p.train)[T][:n]
        expected = textbook.unrolled(Phi, p.costs[1], z, p.lam, p.train, p.val, n, truncate)
        agree(flat(out.state.params, backend), trained, 1e-10)
        agree(flat(out.hypergradient, backend), expected, 1e-10)

    @hundred(problems("quadratic"))
    def test_implicit(self, backend, p):
        expected = textbook.implicit(p.mean, p.costs[1], p.theta, p.lam, p.train, p.val)
        agree(hypergradient(backend, p, anywhere(hg.Direct())), expected, 1e-10)

    @hundred(problems(), st.floats(0.1, 10.0))
    def test_implicit_with_damping(self, backend, p, margin):
        lowest = np.linalg.eigvalsh(textbook.hessian(p.mean, p.theta, p.lam, p.train))[0]
        damping = margin + max(0.0, -float(lowest))
        expected = textbook.implicit(p.mean, p.costs[1], p.theta, p.lam, p.train, p.val, damping)
        agree(hypergradient(backend, p, anywhere(hg.Direct(), damping=damping)), expected, 1e-10)

    @hundred(problems())
    def test_the_iterates_of_conjugate_gradients(self, backend, p):
        H = textbook.hessian(p.costs[0], p.theta, p.lam, p.train[0])
        H, n = H @ H + np.eye(len(H)), len(H)
        A, v = backend.asarray(H), backend.map(backend.asarray, p.params)
        _, tree = backend.ravel(v)
        system = System.at_rest(backend, lambda x, _: tree(A @ backend.ravel(x)[0]), v)
        for k, x in enumerate(textbook.conjugate_gradients(H, p.theta, n), start=1):
            found = hg.CG(max_steps=k, rtol=1e-15).solve(backend, system).x
            agree(flat(found, backend), x, 1e-10)


@each_backend
class TestIdentities:  # what the estimators must say about one another
    @every_rule
    @hundred(p=problems())
    def test_greedy_is_one_step_of_unrolled(self, backend, rule, p):
        warm = estimate(backend, p, hg.Unrolled(rule.update, 2)).state
        one = estimate(backend, p, hg.Greedy(rule.update), warm)
        other = estimate(backend, p, hg.Unrolled(rule.update, 1), warm)
        for result in ("hypergradient", "state"):
            agree(*(flat(getattr(out, result), backend) for out in (one, other)), 1e-12)

    @hundred(problems(), rules, st.integers(0, T))
    def test_truncation_beyond_the_start_is_none(self, backend, p, rule, more):
        full, truncated = hg.Unrolled(rule.update, T), hg.Unrolled(rule.update, T, truncate=T + more)
        agree(hypergradient(backend, p, truncated), hypergradient(backend, p, full), 1e-12)

    @hundred(problems(), rules, st.sampled_from([None, 1, 2]))
    def test_a_tape_of_states_is_as_good_as_a_full_one(self, backend, p, rule, truncate):
        full, states = (hg.Unrolled(rule.update, T, truncate, tape) for tape in (hg.Full(), hg.States()))
        agree(hypergradient(backend, p, states), hypergradient(backend, p, full), 1e-12)

    @hundred(problems("quadratic"), st.integers(1, 5), st.integers(0, 2))
    def test_neumann_terms_at_a_fixed_point_are_the_last_steps(self, backend, p, terms, more):
        at = (p.costs[0], p.theta, p.lam, p.train[0])  # a quadratic's minimum is one Newton step away
        theta = p.theta - np.linalg.solve(textbook.hessian(*at), textbook.nabla_theta(*at))
        p = p._replace(train=p.train[:1], theta=theta, params=cut(theta, p.params))
        series = hypergradient(backend, p, hg.Implicit(hg.Neumann(terms, step_size=0.1)))
        unrolled = hg.Unrolled(hg.SGD(0.1), terms + more, truncate=terms)
        agree(series, hypergradient(backend, p, unrolled), 1e-10)
        agree(series, textbook.neumann(*p.vectors, eta=0.1, terms=terms), 1e-10)

    @hundred(problems("quadratic"))
    def test_solvers_that_converge_are_direct(self, backend, p):
        direct = hypergradient(backend, p, anywhere(hg.Direct()))
        for solver in (hg.CG(rtol=1e-10), hg.Neumann(5000, rtol=1e-10)):
            agree(hypergradient(backend, p, anywhere(solver)), direct, 1e-8)

    @hundred(problems(), linear_estimators, st.floats(-3, 3), st.floats(-3, 3))
    def test_linear_in_the_validation_loss(self, backend, p, estimator, a, b):
        other = lambda xp, theta, lam, _: xp.sum(xp.sin(theta)) + xp.sum(xp.cos(lam))  # noqa: E731
        both = lambda *at: a * p.outer(*at) + b * other(*at)  # noqa: E731
        of = partial(hypergradient, backend, p, estimator)
        agree(of(outer=both), a * of() + b * of(outer=other), 1e-12)

    @hundred(problems(), estimators)
    def test_indifferent_to_how_a_vector_is_cut_into_leaves(self, backend, p, estimator):
        whole = hypergradient(backend, p, estimator, params=p.theta, hparams=p.lam)
        agree(hypergradient(backend, p, estimator), whole, 1e-12)


@each_backend
class TestClosedForm:
    @hundred(skeletons, seeds)
    def test_ridge_regression_with_a_penalty_for_each_feature(self, backend, skeleton, seed):
        rng, n = np.random.default_rng(seed), flat(skeleton).size
        X1, X2, y1, y2, lam = (rng.normal(size=size) for size in ((8, n), (8, n), 8, 8, n))

        def error(xp, theta, lam, batch):
            return 0.5 * xp.mean((batch[0] @ theta - batch[1]) ** 2)

        def ridge(xp, theta, lam, batch):
            return error(xp, theta, lam, batch) + 0.5 * xp.sum(xp.exp(lam) * theta**2)

        H = X1.T @ X1 / 8 + np.diag(np.exp(lam))
        theta = np.linalg.solve(H, X1.T @ y1 / 8)
        p = Drawn(ridge, error, theta, lam, cut(theta, skeleton), cut(lam, skeleton), [(X1, y1)], (X2, y2))
        expected = -np.exp(lam) * theta * np.linalg.solve(H, X2.T @ (X2 @ theta - y2) / 8)
        for solver in (hg.Direct(), hg.CG(rtol=1e-12)):
            agree(hypergradient(backend, p, hg.Implicit(solver)), expected, 1e-10)

    @pytest.mark.parametrize("rule", [hg.Adam, partial(hg.AdamW, weight_decay=0.0), hg.RMSprop])
    @hundred(skeleton=skeletons, seed=seeds, steps=st.integers(1, 3))
    def test_a_gradient_of_exactly_zero(self, backend, rule, skeleton, seed, steps):
        # C̃1 = λᵀθ at λ = 0: each step is −η λ / (|λ| + ε) up to O(λ²), whatever the betas.
        rng, lam = np.random.default_rng(seed), np.zeros(flat(skeleton).size)
        theta, c = rng.normal(size=(2, lam.size))
        costs = (lambda xp, theta, lam, _: lam @ theta, lambda xp, theta, lam, c: c @ theta)
        p = Drawn(*costs, theta, lam, cut(theta, skeleton), cut(lam, skeleton), [None], c)
        for estimator in (hg.Unrolled(rule(lr=0.1, eps=0.01), steps), hg.Greedy(rule(lr=0.1, eps=0.01))):
            agree(hypergradient(backend, p, estimator), -estimator.training_steps * 10.0 * c, 1e-12)


@each_backend
class TestDifferences:  # central differences of real training, to 1e-6
    # From a standstill Adam and RMSprop step along g/|g|, which has a kink where g = 0: so they start warm,
    # or where no gradient is near zero.

    @hundred(problems(), rules, seeds)
    def test_greedy(self, backend, p, rule, seed):
        Phi, z = rule.on(p)
        z = textbook.trajectory(Phi, z, p.lam, p.train[:2])[2]
        direction = np.random.default_rng(seed).normal(size=p.lam.size)

        def trained(h):
            lam = p.lam + h * direction
            return p.costs[1](Phi(z, lam, p.train[2], 2)[: p.theta.size], lam, p.val)

        slope, doubt = ridders(trained, 0.05)
        warm = estimate(backend, p, hg.Unrolled(rule.update, 2)).state
        assert doubt <= 1e-6 * (1 + abs(slope))
        agree(hypergradient(backend, p, hg.Greedy(rule.update), warm) @ direction, slope, 1e-6)

    LEARNED = {
        "sgd": dear(hg.SGD, {"momentum": 0.8}),
        "nesterov": (partial(hg.SGD, nesterov=True), {"momentum": 0.8}),
        "adam": dear(hg.Adam, {"beta1": 0.7, "beta2": 0.9, "eps": 0.1}),
        "adamw": (hg.AdamW, {"beta1": 0.7, "beta2": 0.9, "eps": 0.1}),
        "rmsprop": dear(hg.RMSprop, {"alpha": 0.8, "momentum": 0.7, "eps": 0.1}),
    }

    @pytest.mark.parametrize("kind, constants", LEARNED.values(), ids=LEARNED)
    def test_of_the_constants_of_training_and_of_data_weights(self, backend, kind, constants):
        constants = {"lr": 0.1, "weight_decay": 0.2} | constants
        update = kind(**{name: (lambda h, name=name: h[name]) for name in constants})
        rng = np.random.default_rng(0)
        theta, (train, val) = rng.uniform(size=6), rng.uniform(0.5, 1.5, size=(2, 2, 6))
        hparams = {name: np.array(x) for name, x in constants.items()} | {"weights": rng.uniform(size=6)}

        def loss(theta, batch):  # targets above all outputs, so that each gradient has one sign
            return (network(backend.xp, theta, batch[0]) - batch[1] - 4.0) ** 2

        problem = hg.Bilevel(lambda t, h, b: h["weights"] @ loss(t, b), lambda t, h, b: loss(t, b).mean())
        lam = flat(hparams)
        theta, hparams, train, val = backend.map(backend.asarray, (theta, hparams, train, val))
        unrolled, greedy = hg.Unrolled(update, 4), hg.Greedy(update)
        directions = affordable(backend, None, 1)  # None: every axis
        for estimator in (greedy, unrolled, hg.Unrolled(update, 4, tape=hg.States())):
            at = (problem, theta, hparams, lambda t: train, val, estimator)
            check = hg.check_hypergradient(*at, directions=directions)
            assert max(check.relative_error, check.difference_error) <= 1e-6
            assert check.exact_relative_error <= 1e-10

        # The first step knows no momentum; the one after the fourth does, and there every constant matters.
        start = unrolled.init(problem, theta, hparams)
        warm = unrolled.estimate(problem, start, hparams, lambda t: train, val).state
        _, tree = backend.ravel(hparams)
        one = program(backend, lambda lam: greedy.estimate(problem, warm, tree(lam), train, val))
        after = lambda lam: one(backend.asarray(lam))  # noqa: E731
        for axis, g in zip(np.eye(lam.size), flat(after(lam).hypergradient, backend), strict=True):
            slope, doubt = ridders(lambda h, axis=axis: float(after(lam + h * axis).outer_value), 0.05)
            assert max(abs(g - slope), doubt) <= 1e-6 * abs(slope)


KINDS = hg.Real(), hg.Positive(), hg.Positive("softplus"), hg.NonNegative(), hg.Interval(-1, 2), hg.Simplex()


@each_backend
class TestSpaces:  # dC2/du = (∂λ/∂u)ᵀ dC2/dλ
    @hundred(problems(), st.data())
    def test_chain_rule(self, backend, p, data):
        def kind(leaf):  # a simplex needs an axis to sum over
            found = data.draw(st.sampled_from(KINDS))
            return hg.Real() if found == hg.Simplex() and 0 in (leaf.ndim, leaf.size) else found

        space = optree.tree_map(kind, p.hparams)
        problem, params, drawn, train, val = p.on(backend)
        free = backend.map(lambda s, u: abs(u) if s == hg.NonNegative() else u, space, drawn)
        constrain = partial(spaces.constrain, backend, space)
        hparams = constrain(free)
        there_and_back = constrain(spaces.unconstrain(backend, space, hparams))
        agree(flat(there_and_back, backend), flat(hparams, backend), 1e-12)

        composed = hg.Bilevel(
            lambda theta, u, b: problem.inner(theta, constrain(u), b),
            lambda theta, u, b: problem.outer(theta, constrain(u), b),
        )
        greedy = hg.Greedy(SGD)
        of_hparams = hg.hypergradient(problem, params, hparams, train[0], val, greedy)
        chained = spaces.chain(backend, space, free, of_hparams)
        at = (composed, params, free, train[0], val, greedy)
        agree(flat(chained, backend), flat(hg.hypergradient(*at), backend), 1e-12)
        check = hg.check_hypergradient(*at, directions=1)
        agree(check.estimate, check.differences, 1e-6)


@beside_numpy
class TestFrameworks:  # every other one against NumPy, on the same problem
    @pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
    @hundred(p=problems())
    def test_agree(self, backend, estimator, p):
        mine, other = (estimate(b, p, estimator) for b in (backend, NUMPY))
        agree(flat(mine.hypergradient, backend), flat(other.hypergradient), 1e-10)
        agree(flat(mine.state, backend), flat(other.state), 1e-10)


def in_single(p):
    single = partial(optree.tree_map, lambda x: np.asarray(x, np.float32))
    return p._replace(**{name: single(getattr(p, name)) for name in ("params", "hparams", "train", "val")})


class TestPrecision:  # against NumPy in float64
    @each_backend
    @hundred(problems(), estimators)
    def test_float32(self, backend, p, estimator):
        out = estimate(backend, in_single(p), estimator)
        leaves = backend.flatten((out.hypergradient, out.state.params, out.state.opt_state))[0]
        assert {backend.describe(leaf).dtype for leaf in leaves} == {"float32"}
        agree(flat(out.hypergradient, backend), hypergradient(NUMPY, p, estimator), 1e-5)

    @on_torch
    @hundred(problems(), without_promises)
    def test_matrix_products_in_bfloat16(self, backend, p, estimator):
        import torch

        def rounded(cost, *at):
            with torch.autocast("cpu", torch.bfloat16):
                return cost(*at)

        single = in_single(p)
        mixed = single._replace(inner=partial(rounded, p.inner), outer=partial(rounded, p.outer))
        mine, other = (estimate(backend, q, estimator) for q in (mixed, single))
        assert mine.inner_value != other.inner_value and mine.outer_value != other.outer_value
        agree(flat(mine.hypergradient, backend), hypergradient(NUMPY, p, estimator), 1e-1)


@each_backend
class TestManners:
    @hundred(problems(), estimators)
    def test_what_is_given_is_left_as_it_was(self, backend, p, estimator):
        problem, params, hparams, train, val = p.on(backend)
        batches = batches_for(estimator, backend, train)
        state = estimator.init(problem, params, hparams)

        def bits(tree):
            leaves = [backend.to_numpy(leaf).tobytes() for leaf in optree.tree_leaves(tree)]
            return backend.paths(tree, ""), leaves

        given = bits((params, hparams, train, val, state))
        first, again = (estimator.estimate(problem, state, hparams, batches, val) for _ in range(2))
        assert bits((params, hparams, train, val, state)) == given
        assert bits(first) == bits(again)
