"""Faults on each framework: the right error, by name, and nothing half done.

Values are given in NumPy and handed to the library as arrays of the framework. Losses are written in the
operators and methods that the arrays of all frameworks share.
"""

import autograd
import numpy as np
import optree
import pytest
from numpy.testing import assert_allclose

import hypergrad as hg
from support import frameworks
from support.frameworks import BACKENDS, dear
from support.installed import jax, torch
from support.noise import normal

parametrize = pytest.mark.parametrize
SOLVERS = [hg.CG(), hg.Direct(), hg.Neumann(), hg.Identity()]
SGD, HEAVY, TAPES = hg.SGD(0.05), hg.SGD(0.05, momentum=0.5), [hg.Full(), hg.States()]
ESTIMATORS = [hg.Greedy(HEAVY), hg.Greedy(SGD, "gradient"), hg.Greedy(hg.Adam(eps=0.1), lookahead=False)]
ESTIMATORS += [hg.Unrolled(u, 3, cut, tape) for u in (SGD, HEAVY) for cut in (None, 2) for tape in TAPES]
ESTIMATORS += [
    hg.Implicit(solver, checks=hg.Checks(tolerance=1e9)) for solver in SOLVERS
]  # every point counts as an optimum
# Of them the cheap ones, and with whatever else the tests make, those compiled: one of each kind either way.
EAGER = [
    hg.Greedy(HEAVY),
    hg.Unrolled(HEAVY, 3, 2, hg.States()),
    hg.Implicit(hg.Direct(), checks=hg.Checks(tolerance=1e9)),
]
CHEAP = [
    *EAGER,
    hg.Greedy(SGD, "gradient"),
    hg.Unrolled(SGD, 3),
    hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=1e9)),
]
every_estimator = parametrize("estimator", [e if e in CHEAP else dear(e) for e in ESTIMATORS], ids=repr)
each_tape = parametrize("tape", TAPES, ids=repr)
every_rule = parametrize("train_by", [hg.Greedy, *(lambda u, t=t: hg.Unrolled(u, 3, tape=t) for t in TAPES)])
plain_training = parametrize("steps, tape", [(1, None), (3, hg.Full()), (3, hg.States())], ids=repr)
each_loss = parametrize("where, data", [("T1", "train"), ("T2", "val")])
each_tree = parametrize("tree, leaf", [("params", "w"), ("hparams", "x")])
STILL = [{"x": np.zeros((5, 2)), "y": np.zeros(5)}] * 3  # batches that leave a zero where it is


def batches(count=3, dtype=float):
    rng = np.random.default_rng(0)
    draw = [(rng.normal(size=(5, 2)), rng.normal(size=5)) for _ in range(count)]
    return [{"x": x.astype(dtype), "y": y.astype(dtype)} for x, y in draw]


def weights(dtype=float):
    return {"w": np.array([0.3, -0.7], dtype)}


def strengths(dtype=float):
    return {"x": np.array([-1.0, 0.5], dtype)}


def fit(params, hparams, batch):
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()


def ridge(params, hparams, batch):
    return fit(params, hparams, batch) + (hparams["x"] ** 2 * params["w"] ** 2).sum()


RIDGE = hg.Bilevel(inner=ridge, outer=fit)


def losses(where, loss):
    """Put a faulty loss on T1 or T2, and a sound one on the other."""
    return hg.Bilevel(loss, fit) if where == "T1" else hg.Bilevel(ridge, loss)


def converted(backend, tree):
    """The tree with its NumPy arrays made into those of the framework."""
    foreign = lambda leaf: isinstance(leaf, np.ndarray) and not backend.owns(leaf)  # noqa: E731
    return optree.tree_map(lambda leaf: backend.asarray(leaf) if foreign(leaf) else leaf, tree)


def seen(backend, tree):
    """All that one could see change of the arrays in a tree: types, bits, and torch's marks."""
    leaves = [leaf for leaf in optree.tree_leaves(tree) if backend.owns(leaf)]
    marks = [(type(x), getattr(x, "requires_grad", False), getattr(x, "grad", None) is None) for x in leaves]
    return optree.tree_paths(tree), [backend.to_numpy(leaf).tobytes() for leaf in leaves], marks


def surroundings():
    """What else a call could disturb: global generators and, in torch and JAX, the modes."""
    states = [
        np.asarray(x).tobytes() for b in BACKENDS.values() for x in optree.tree_leaves(b.random.state())
    ]
    modes = [dict(jax.config.values)] if jax else []
    if torch:
        modes += [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        modes += [torch.is_autocast_enabled("cpu")]
    return states, modes


def estimate(backend, estimator, problem=RIDGE, **given):
    """Estimate, and see that whether it fails or not every input is bit for bit what it was."""
    given = {"params": weights(), "hparams": strengths(), "train": batches(), "val": batches()[0]} | given
    params, hparams, train, val = (converted(backend, tree) for tree in given.values())
    inputs, state = (params, hparams, train, val), None
    before, kept = seen(backend, inputs), seen(backend, state)
    try:
        state = estimator.init(problem, params, hparams)
        kept = seen(backend, state)
        compiled, data = estimator not in EAGER, {"train": train, "val": val}
        out = frameworks.estimate(backend, estimator, problem, state, hparams, compiled=compiled, **data)
    finally:
        assert seen(backend, inputs) == before
        assert seen(backend, state) == kept
    for mine, model in zip(*(backend.flatten(tree)[0] for tree in (out.hypergradient, hparams)), strict=True):
        assert type(mine) is type(model) and backend.describe(mine) == backend.describe(model)
    own = {id(leaf) for leaf in optree.tree_leaves(inputs)}  # `Implicit` hands the parameters back
    new = [leaf for leaf in backend.flatten(out)[0] if id(leaf) not in own]
    assert not any(getattr(leaf, "requires_grad", False) for leaf in new)
    found, trained = (backend.map(backend.to_numpy, tree) for tree in (out.hypergradient, out.state.params))
    return out._replace(hypergradient=found, state=out.state._replace(params=trained))


def refused(error, built_in, call, *args, **kwargs):
    """Call what must fail; return the error, after seeing that generators and modes are as they were."""
    for backend in BACKENDS.values():
        backend.random.restore(backend.random.state(seed=5))
        normal(backend, 3)
    before = surroundings()
    with np.errstate(all="ignore"), pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, hg.HypergradError) and isinstance(caught.value, built_in)
    assert surroundings() == before
    return caught.value


def says(error, *parts):
    assert [part for part in parts if part not in str(error)] == [], f"missing from:\n{error}"


def is_right(backend, problem, steps, tape, val):
    """Compare with central differences of gradient descent by hand."""

    def outer(x):
        w = weights()["w"]
        for batch in batches()[:steps]:
            w = w - 0.05 * autograd.grad(lambda u, b=batch: problem.inner({"w": u}, {"x": x}, b))(w)
        return problem.outer({"w": w}, {"x": x}, val)

    estimator = hg.Greedy(SGD) if tape is None else hg.Unrolled(SGD, steps, tape=tape)
    truth = [(outer(strengths()["x"] + d) - outer(strengths()["x"] - d)) / 2e-5 for d in 1e-5 * np.eye(2)]
    assert_allclose(estimate(backend, estimator, problem, val=val).hypergradient["x"], truth, rtol=1e-6)
