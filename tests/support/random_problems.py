"""Random problems, rules and estimators.

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
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import hypergrad as hg
from support import frameworks
from support.examples import tried
from support.frameworks import NUMPY, dear
from support.nightly import NIGHTLY, rounds

TOO_SLOW = [HealthCheck.too_slow]
MANY = settings(
    max_examples=rounds(100, 1000),
    derandomize=not NIGHTLY,
    deadline=None,
    database=None,
    suppress_health_check=TOO_SLOW,
)
FEW = settings(MANY, max_examples=4, phases=[Phase.generate])  # what fails is not made smaller for minutes
T = 3


hundred = tried(MANY, FEW)


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


def once(formula):
    """Compute the value of a dense formula once for all frameworks, which are tried on the same examples."""
    values = {}

    @wraps(formula)
    def remembered(p, *rest):
        key = (p.inner, p.theta.tobytes(), p.lam.tobytes(), *rest)
        if key not in values:
            values[key] = formula(p, *rest)
        return values[key]

    return remembered


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
anywhere = partial(hg.Implicit, checks=hg.Checks(away="ignore"))


def definite(solver):
    return anywhere(hg.Damped(solver, 20.0))


UNSOLVED = [
    *(hg.Greedy(ADAM), hg.Greedy(SGD, response="gradient"), hg.Greedy(SGD, lookahead=False)),
    *(hg.Unrolled(SGD, T), hg.Unrolled(ADAM, T, truncate=2), hg.Unrolled(ADAM, T, tape=hg.States())),
    *(hg.Unrolled(RULES["rmsprop"].update, T), definite(hg.Neumann(4, 0.01)), definite(hg.Identity())),
]
LINEAR = [*UNSOLVED, definite(hg.Direct())]
ESTIMATORS = [*LINEAR, definite(hg.CG(rtol=1e-5))]
without_promises, linear_estimators, estimators = map(st.sampled_from, (UNSOLVED, LINEAR, ESTIMATORS))
