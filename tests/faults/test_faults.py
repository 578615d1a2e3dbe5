"""What comes of each fault, on each framework: the right error, by name, and nothing half done.

Values are given in NumPy and handed to the library as arrays of the framework. Losses are written in the
operators and methods that the arrays of all frameworks share.
"""

import itertools
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import autograd
import numpy as np
import optree
import pytest
from autograd.tracer import getval
from numpy.testing import assert_allclose, assert_array_equal
from support import frameworks
from support.frameworks import (
    BACKENDS,
    NUMPY,
    affordable,
    beside_numpy,
    dear,
    on_jax,
    on_torch,
    with_a_generator,
)

import hypergrad as hg
from hypergrad import errors

torch, jax = (pytest.importorskip(name) if name in BACKENDS else None for name in ("torch", "jax"))

parametrize, SOLVERS = pytest.mark.parametrize, [hg.CG(), hg.Direct(), hg.Neumann(), hg.Identity()]
SGD, HEAVY, TAPES = hg.SGD(0.05), hg.SGD(0.05, momentum=0.5), [hg.Full(), hg.States()]
ESTIMATORS = [hg.Greedy(HEAVY), hg.Greedy(SGD, "gradient"), hg.Greedy(hg.Adam(eps=0.1), lookahead=False)]
ESTIMATORS += [hg.Unrolled(u, 3, cut, tape) for u in (SGD, HEAVY) for cut in (None, 2) for tape in TAPES]
ESTIMATORS += [hg.Implicit(solver, tolerance=1e9) for solver in SOLVERS]  # every point counts as an optimum
# Of them the cheap ones, and with whatever else the tests make, those compiled: one of each kind either way.
EAGER = [hg.Greedy(HEAVY), hg.Unrolled(HEAVY, 3, 2, hg.States()), hg.Implicit(hg.Direct(), tolerance=1e9)]
CHEAP = [*EAGER, hg.Greedy(SGD, "gradient"), hg.Unrolled(SGD, 3), hg.Implicit(hg.CG(), tolerance=1e9)]
every_estimator = parametrize("estimator", [e if e in CHEAP else dear(e) for e in ESTIMATORS], ids=repr)
each_tape = parametrize("tape", TAPES, ids=repr)
every_rule = parametrize("train_by", [hg.Greedy, *(lambda u, t=t: hg.Unrolled(u, 3, tape=t) for t in TAPES)])
plain_training = parametrize("steps, tape", [(1, None), (3, hg.Full()), (3, hg.States())], ids=repr)
each_loss = parametrize("where, data", [("T1", "train"), ("T2", "val")])
each_tree = parametrize("tree, leaf", [("params", "w"), ("hparams", "x")])
STILL = [{"x": np.zeros((5, 2)), "y": np.zeros(5)}] * 3  # batches that leave a zero where it is


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request):
    return request.param


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


def normal(backend, *shape):
    """Standard normal numbers from the framework's own global generator; JAX has none."""
    if backend.name == "torch":
        return torch.randn(shape, dtype=torch.float64)
    return np.random.normal(size=shape) if backend.name == "numpy" else None


def arrays(backend, tree):
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
    states = [np.asarray(x).tobytes() for b in BACKENDS.values() for x in optree.tree_leaves(b.generator())]
    modes = [dict(jax.config.values)] if jax else []
    if torch:
        modes += [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        modes += [torch.is_autocast_enabled("cpu")]
    return states, modes


def estimate(backend, estimator, problem=RIDGE, **given):
    """Estimate, and see that whether it fails or not every input is bit for bit what it was."""
    given = {"params": weights(), "hparams": strengths(), "train": batches(), "val": batches()[0]} | given
    params, hparams, train, val = (arrays(backend, tree) for tree in given.values())
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
        backend.restore(backend.generator(seed=5))
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


def solve(backend, solver, hessian, **options):
    """Where ∇C̃1 = 0 and ∇C2 = (1, 1, …): the sum of H⁻¹ ∇C2 as the estimate has it, and the report."""
    H = backend.asarray(hessian)
    inner = lambda p, h, b: 0.5 * p["w"] @ H @ p["w"] + h["x"] * p["w"].sum()  # noqa: E731
    start = {"params": {"w": np.zeros(len(hessian))}, "hparams": {"x": np.array(0.0)}, "train": [None]}
    problem = hg.Bilevel(inner, lambda p, h, b: p["w"].sum())
    out = estimate(backend, hg.Implicit(solver, **options), problem, **start)
    return -out.hypergradient["x"], out.report


def unsolved(backend, solver, hessian):
    return refused(errors.SolveError, ArithmeticError, solve, backend, solver, hessian)


def rotated(*eigenvalues):
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(len(eigenvalues),) * 2))
    return q @ np.diag(eigenvalues) @ q.T


class TestLinearSolve:
    @parametrize("solver", SOLVERS[:2], ids=repr)
    @parametrize("scale", [1e-6, 1.0, 1e6])
    @parametrize("hessian", [np.diag([1.0, 0.0]), rotated(3.0, 2.0, 1.0, 0.0)], ids=["2", "4"])
    def test_singular(self, backend, solver, scale, hessian):
        error = unsolved(backend, solver, scale * hessian)
        assert error.reason == "singular" and error.residual > 1e-3
        says(error, "damping")
        with pytest.warns(errors.SolveWarning, match="damping"):
            assert solve(backend, solver, scale * hessian, on_failure="warn")[1].residual > 1e-3

    def test_singular_but_damped_or_consistent(self, backend):
        damped, _ = solve(backend, hg.CG(), np.diag([1.0, 0.0]), damping=0.1)
        assert_allclose(damped, 1 / 1.1 + 1 / 0.1, rtol=1e-9)
        assert_allclose(solve(backend, hg.CG(), np.ones((2, 2)))[0], 1.0, rtol=1e-12)

    @parametrize("solver", SOLVERS[:2], ids=repr)
    @parametrize("eigenvalues", [(2.0, -1.0), (1.0, -1.0), (-1.0, -1.0), (3.0, 2.0, -1.0)], ids=repr)
    def test_indefinite(self, backend, solver, eigenvalues):
        for hessian in (np.diag(eigenvalues), rotated(*eigenvalues)):
            error = unsolved(backend, solver, hessian)
            assert error.reason == "negative_curvature" and 1 <= error.step <= len(hessian)
            says(error, "damping")
            unsolved(backend, hg.Neumann(100, 0.1, rtol=1e-6), hessian)

    def test_out_of_steps_gives_the_true_residual(self, backend):
        hessian, v = rotated(1.0, 2.0, 5.0, 9.0, 20.0), np.ones(5)
        krylov = np.stack([v, hessian @ v], axis=1)  # the x of CG minimises over this space
        left = v - hessian @ krylov @ np.linalg.solve(krylov.T @ hessian @ krylov, krylov.T @ v)
        error = unsolved(backend, hg.CG(max_steps=2), hessian)
        assert (error.reason, error.step) == ("max_steps", 2)
        assert_allclose(error.residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-9)
        says(error, "max_steps", "damping", "on_failure", f"{error.residual:.1e}")
        left, error = v - 0.05 * hessian @ v, unsolved(backend, hg.Neumann(1, 0.05, 1e-6), hessian)
        assert (error.reason, error.step) == ("max_steps", 1)
        assert_allclose(error.residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-9)

    def test_the_residual_of_the_recurrence_is_not_believed(self, backend):
        assert unsolved(backend, hg.CG(1000, rtol=1e-15), rotated(*np.logspace(0, 10, 12))).residual > 1e-15

    def test_neumann_diverges(self, backend):
        error = unsolved(backend, hg.Neumann(100, 1.0), np.diag([1.0, 10.0]))
        assert error.reason == "diverged" and error.step <= 4
        numbers = [float(n) for n in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", str(error))]
        assert any(abs(n - 0.2) < 0.01 for n in numbers), f"the stable step 2/λmax = 0.2 is not in:\n{error}"
        found, _ = solve(backend, hg.Neumann(400, 0.19, 1e-9), np.diag([1.0, 10.0]))
        assert_allclose(found, 1.1, rtol=1e-7)


class TestNonFiniteLoss:
    @every_estimator
    @each_loss
    @parametrize("bad", [np.nan, np.inf])
    def test_says_in_which_loss(self, backend, estimator, where, data, bad):
        spoilt = {data: [batches()[0] | {"y": np.full(5, bad)}] * (3 if data == "train" else 1)}
        error = refused(errors.NonFiniteError, ArithmeticError, estimate, backend, estimator, **spoilt)
        assert (error.where, error.path) == (where, None) and (where == "T2" or error.step == 0)
        says(error, where)

    @each_tape
    @parametrize("first", [0, 3])
    def test_says_at_which_training_step(self, backend, tape, first):
        estimator, good = hg.Unrolled(SGD, steps=3, tape=tape), batches()[0]
        params, hparams, val = (arrays(backend, tree) for tree in (weights(), strengths(), good))
        state = estimator.init(RIDGE, params, hparams)._replace(step=first)
        spoilt = [good | {"y": good["y"] * (np.nan if t == first + 1 else 1.0)} for t in range(6)]
        stacked = arrays(backend, optree.tree_map(lambda *leaves: np.stack(leaves), *spoilt))
        train = lambda t: backend.map(lambda leaf: leaf[t], stacked)  # noqa: E731
        call = (estimator.estimate, RIDGE, state, hparams, train, val)
        error = refused(errors.NonFiniteError, ArithmeticError, *call)
        assert (error.where, error.step) == ("T1", first + 1)

    def test_in_the_steps_that_the_tuner_trains_alone(self, backend):
        good = batches()[0]
        train = [good, good | {"y": good["y"] * np.nan}, good, good]
        given = arrays(backend, (weights(), strengths(), train, [good]))
        before = seen(backend, given)
        tuner = hg.Tuner(RIDGE, hg.Greedy(SGD), every=4)
        error = refused(errors.NonFiniteError, ArithmeticError, tuner.run, *given, 4)
        assert (error.where, error.step) == ("T1", 1)
        assert seen(backend, given) == before


class TestNonFiniteDerivative:
    @every_estimator
    @each_loss
    @each_tree
    def test_of_a_square_root_at_zero(self, backend, estimator, where, data, tree, leaf):
        root = {"params": lambda p, h: p["w"][0] ** 0.5, "hparams": lambda p, h: p["w"][1] * h["x"][0] ** 0.5}
        trees = {"train": STILL, tree: {leaf: np.array([0.0, 0.5])}}
        problem = losses(where, lambda p, h, b: ridge(p, h, b) + root[tree](p, h))
        error = refused(
            errors.NonFiniteError, ArithmeticError, estimate, backend, estimator, problem, **trees
        )
        assert (error.where, error.path) == (where, f"{tree}['{leaf}']")
        says(error, where, error.path)

    @each_tape
    def test_of_adam_without_epsilon(self, backend, tape):
        estimator = hg.Unrolled(hg.Adam(0.1, eps=lambda h: h["eps"]), steps=3, tape=tape)
        trees = {"params": {"w": np.zeros(2)}, "hparams": strengths() | {"eps": np.array(0.0)}}
        trees["train"] = STILL
        error = refused(errors.NonFiniteError, ArithmeticError, estimate, backend, estimator, **trees)
        says(error, error.path)
        trees["hparams"]["eps"] = np.array(1e-8)
        assert np.all(np.isfinite(estimate(backend, estimator, **trees).hypergradient["x"]))


class TestImplicitAwayFromTheOptimum:
    def test_warns_or_fails_with_the_gradient_norm_and_the_tolerance(self, backend):
        batch = batches()[0]
        norm = np.linalg.norm(autograd.grad(lambda w: ridge({"w": w}, strengths(), batch))(weights()["w"]))
        with pytest.warns(errors.InnerNotConvergedWarning) as caught:
            out = estimate(backend, hg.Implicit(hg.CG(), tolerance=1e-3, strict=False), train=batch)
        strict = hg.Implicit(hg.CG(), tolerance=1e-3, strict=True)
        error = refused(
            errors.InnerNotConvergedError, ArithmeticError, estimate, backend, strict, train=batch
        )
        norms = [backend.to_numpy(out.report.inner_gradient_norm), error.gradient_norm]
        assert_allclose(norms, norm, rtol=1e-12)
        assert error.tolerance == 1e-3
        for message in (caught[0].message, error):
            says(message, f"{norm:.1e}", "1.0e-03")


class TestUnusedHyperparameter:
    hparams = strengths() | {"unused": np.ones(3)}

    @every_estimator
    def test_is_named_or_allowed_and_zero(self, backend, estimator):
        call = (estimate, backend, estimator)
        error = refused(errors.DisconnectedError, ValueError, *call, hparams=self.hparams)
        assert error.path == "hparams['unused']"
        says(error, "hparams['unused']", "allow_unused")
        allowing = type(estimator)(**vars(estimator) | {"allow_unused": True})
        out = estimate(backend, allowing, hparams=self.hparams)
        assert_array_equal(out.hypergradient["unused"], np.zeros(3), strict=True)
        assert_array_equal(out.hypergradient["x"], estimate(backend, estimator).hypergradient["x"])

    @every_estimator
    def test_is_decided_by_the_graph_and_not_by_a_zero(self, backend, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + 0.0 * h["unused"].sum() * p["w"][0]  # noqa: E731
        out = estimate(backend, estimator, hg.Bilevel(inner, fit), hparams=self.hparams)
        assert_array_equal(out.hypergradient["unused"], np.zeros(3))

    def test_a_learning_rate_has_no_part_in_the_literal_equation(self, backend):
        literal, hparams = hg.Greedy(hg.SGD(lambda h: h["lr"]), "gradient"), {"lr": np.array(0.1)}
        call = (estimate, backend, literal)
        error = refused(errors.DisconnectedError, ValueError, *call, hparams=strengths() | hparams)
        assert error.path == "hparams['lr']"


class TestHyperparameterOfOneRole:
    @plain_training
    def test_in_t1_only_is_right_by_central_differences(self, backend, steps, tape):
        is_right(backend, RIDGE, steps, tape, batches()[0])

    @every_estimator
    def test_in_t1_only_is_valid_and_only_added_is_exactly_zero(self, backend, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + (h["added"] ** 2).sum()  # noqa: E731
        problem = hg.Bilevel(inner, lambda p, h, b: fit(p, h, b) + h["direct"] ** 2)
        hparams = strengths() | {"added": np.ones(3), "direct": np.array(2.0)}
        found, _, _, _, report = estimate(backend, estimator, problem, hparams=hparams)
        assert np.all(found["x"] != 0.0) and found["direct"] == 4.0
        assert_array_equal(found["added"], np.zeros(3), strict=True)
        assert report.responds == {"x": True, "added": False, "direct": False}
        # A program returns arrays alone.
        returned = estimator not in EAGER and backend.name == "jax"
        known = jax.Array if returned else bool
        assert all(isinstance(responds, known) for responds in report.responds.values())


class TestKindsOfLeaves:
    @every_estimator
    @each_tree
    @parametrize("dtype", ["int64", "uint8", "bool", "complex128"])
    def test_integer_boolean_and_complex_ones_are_refused(self, backend, estimator, tree, leaf, dtype):
        given = {tree: {leaf: weights()["w"], "layers": [{"w": np.ones(2, dtype)}]}}
        real = (errors.LeafTypeError, TypeError)
        kind = (errors.UnsupportedLeafError, NotImplementedError) if dtype == "complex128" else real
        error = refused(*kind, estimate, backend, estimator, **given)
        says(error, f"{tree}['layers'][0]['w']", dtype, "relax" if kind == real else "complex")

    @beside_numpy
    @each_tree
    def test_arrays_of_two_frameworks_are_refused(self, backend, tree, leaf):
        given = arrays(backend, {"params": weights(), "hparams": strengths()})
        mixed = given | {tree: given[tree] | {"other": np.ones(2)}}
        error = refused(errors.LeafTypeError, TypeError, hg.Greedy(SGD).init, RIDGE, **mixed)
        says(error, "numpy", backend.name)

    @every_estimator
    @parametrize("tree", ["params", "hparams"])
    @parametrize("empty", [{}, (), {"a": None}], ids=repr)
    def test_an_empty_tree_is_refused(self, backend, estimator, tree, empty):
        one = lambda p, h, b: backend.asarray(1.0)  # noqa: E731
        call = (estimate, backend, estimator, hg.Bilevel(one, one))
        says(refused(errors.ArgumentError, ValueError, *call, **{tree: empty}), tree)

    @every_estimator
    def test_zero_size_leaves_work_and_none_is_no_leaf(self, backend, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + p["void"].sum() ** 2 * h["void"].sum()  # noqa: E731
        params = weights() | {"void": np.zeros((0, 3)), "none": None}
        hparams = strengths() | {"void": np.zeros(0), "none": None}
        problem = hg.Bilevel(inner, fit)
        found, state, *_ = estimate(backend, estimator, problem, params=params, hparams=hparams)
        assert (found["none"], state.params["none"]) == (None, None)
        assert (found["void"].shape, state.params["void"].shape) == ((0,), (0, 3))
        assert_allclose(found["x"], estimate(backend, estimator).hypergradient["x"], rtol=1e-12)

    @every_estimator
    def test_0d_leaves_work(self, backend, estimator):
        inner = lambda p, h, b: ((p - 1.0) ** 2 + h * p**2).sum()  # noqa: E731
        problem = hg.Bilevel(inner, lambda p, h, b: ((p + 1.0) ** 2).sum())
        trees = [{"params": np.full(s, 0.4), "hparams": np.full(s, 0.5)} for s in [(), (1,)]]
        found, expected = (estimate(backend, estimator, problem, **tree).hypergradient for tree in trees)
        assert found.shape == () and found != 0.0
        assert_allclose(found, expected[0], rtol=1e-12)


def detach(x):
    return x.detach()


def no_grad(x):
    with torch.no_grad():
        return 1.0 * x


def stop_gradient(x):
    return jax.lax.stop_gradient(x)


CUTS = [("numpy", getval), ("torch", detach), ("torch", no_grad), ("jax", stop_gradient)]
CUTS = {f"{name}-{cut.__name__}": (BACKENDS[name], cut) for name, cut in CUTS if name in BACKENDS}


@parametrize("backend, cut", CUTS.values(), ids=CUTS)
class TestDetached:
    @every_estimator
    @each_loss
    def test_parameters(self, backend, cut, estimator, where, data):
        problem = losses(where, lambda p, h, b: ridge({"w": cut(p["w"])}, h, b))
        error = refused(errors.DisconnectedError, ValueError, estimate, backend, estimator, problem)
        assert error.path.startswith("params")
        says(error, where, error.path, "autograd")

    @every_estimator
    def test_a_hyperparameter(self, backend, cut, estimator):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, {"x": cut(h["x"])}, b), fit)
        error = refused(errors.DisconnectedError, ValueError, estimate, backend, estimator, problem)
        assert error.path == "hparams['x']"
        says(error, "hparams['x']", "autograd")


class TestShapesAndStructures:
    CHANGES = {
        "shape": (lambda new, m: ({"w": new["w"][:1]}, m), ["params['w']", "(2,)", "(1,)"]),
        "key": (lambda new, m: ({"v": new["w"]}, m), ["params", "'w'", "'v'"]),
        "opt_state": (lambda new, m: (new, m[:1]), ["opt_state", "(2,)", "(1,)"]),
    }

    @every_estimator
    @each_loss
    @parametrize("shape", [None, (1,), (2,), (2, 3)])
    def test_a_loss_is_a_scalar(self, backend, estimator, where, data, shape):
        ones = None if shape is None else backend.asarray(np.ones(shape))
        vector = lambda p, h, b: None if shape is None else ridge(p, h, b) * ones  # noqa: E731
        built_in = ValueError if shape else (ValueError, TypeError)
        call = (estimate, backend, estimator, losses(where, vector))
        says(refused(hg.HypergradError, built_in, *call), where, *([str(shape), "()"] if shape else []))

    @every_rule
    @parametrize("change, parts", CHANGES.values(), ids=CHANGES)
    def test_an_update_keeps_them(self, backend, train_by, change, parts):
        step = lambda g, m, p, h: change({"w": p["w"] - 0.1 * g["w"]}, m)  # noqa: E731
        call = (estimate, backend, train_by((lambda p: backend.asarray(np.zeros(2)), step)))
        says(refused(errors.ArgumentError, ValueError, *call), *parts)

    @every_rule
    def test_a_learning_rate_is_a_number(self, backend, train_by):
        square, rule = lambda p, h, b: p["w"] ** 2, hg.SGD(lambda h: h["lr"])
        trees = {"params": {"w": np.array(0.5)}, "hparams": {"lr": np.full(3, 0.1)}}
        call = (estimate, backend, train_by(rule), hg.Bilevel(square, square))
        says(refused(errors.ArgumentError, ValueError, *call, **trees), "(3,)", "()")

    def test_a_state_of_other_parameters(self, backend):
        estimator = hg.Greedy(HEAVY)
        params, other, hparams, train = arrays(
            backend, (weights(), {"w": np.zeros(3)}, strengths(), batches())
        )
        state = estimator.init(RIDGE, other, hparams)._replace(params=params)
        call = (estimator.estimate, RIDGE, state, hparams, train, train[0])
        says(refused(errors.ArgumentError, ValueError, *call), "(2,)", "(3,)")


class TestDtypes:
    single = {"params": weights("f4"), "hparams": strengths("f4"), "train": batches(3, "f4")}
    single |= {"val": batches(1, "f4")}
    MIXED = {
        "params-hparams": (single | {"hparams": strengths()}, ["params['w']", "hparams['x']"]),
        "params": ({"params": weights() | {"b": np.ones(1, "f4")}}, ["params['w']", "params['b']"]),
        "hparams": ({"hparams": strengths() | {"b": np.ones(1, "f4")}}, ["hparams['b']"]),
        "train": (single | {"train": batches(3)}, ["train['x']"]),
        "val": (single | {"val": batches(1)}, ["val['x']"]),
    }

    @every_estimator
    @parametrize("trees, paths", MIXED.values(), ids=MIXED)
    def test_mixed_ones_are_refused(self, backend, estimator, trees, paths):
        b = lambda *trees: sum((t["b"] ** 2).sum() for t in trees if "b" in t)  # noqa: E731
        problem = hg.Bilevel(lambda p, h, batch: ridge(p, h, batch) + b(p, h), fit)
        error = refused(errors.LeafTypeError, TypeError, estimate, backend, estimator, problem, **trees)
        says(error, "float32", "float64", *paths)

    @every_estimator
    def test_float32_stays_float32(self, backend, estimator):
        out = estimate(backend, estimator, **self.single)
        assert out.hypergradient["x"].dtype == out.state.params["w"].dtype == np.float32
        assert_allclose(out.hypergradient["x"], estimate(backend, estimator).hypergradient["x"], rtol=1e-3)

    @every_rule
    def test_an_update_that_upcasts_is_refused(self, backend, train_by):
        rates = backend.asarray(np.full(2, 0.1))
        pair = (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - g["w"] * rates}, s))
        error = refused(errors.LeafTypeError, TypeError, estimate, backend, train_by(pair), **self.single)
        says(error, "params['w']", "float32", "float64")


@beside_numpy
@parametrize("estimator", [hg.Greedy(SGD), hg.Greedy(HEAVY), hg.Unrolled(HEAVY, 3, 2, hg.States())], ids=repr)
class TestHalfPrecision:
    @staticmethod
    def given(backend, dtype):
        trees = {"params": weights(), "hparams": strengths(), "train": batches(), "val": batches()[0]}
        like = backend.xp.zeros((), dtype=getattr(backend.xp, dtype))
        return optree.tree_map(lambda x: backend.asarray(x, like=like), trees)

    def test_is_kept(self, backend, estimator):
        out = estimate(backend, estimator, **self.given(backend, "float16"))
        expected = estimate(backend, estimator).hypergradient["x"]
        assert out.hypergradient["x"].dtype == out.state.params["w"].dtype == np.float16
        assert_allclose(out.hypergradient["x"], expected, rtol=0.1)

    @each_loss
    def test_an_overflow_advises_float32(self, backend, estimator, where, data):
        sound = ridge if where == "T1" else fit
        problem = losses(where, lambda p, h, b: sound(p, h, b) * 3e4 * 3e4)
        call = (estimate, backend, estimator, problem)
        error = refused(errors.NonFiniteError, ArithmeticError, *call, **self.given(backend, "float16"))
        assert (error.where, error.path) == (where, None)
        says(error, "float32")


@with_a_generator
class TestNoiseInsideTheLoss:
    @pytest.fixture
    def noisy(self, backend):
        def loss(params, hparams, batch):
            noise = batch["noise"] if "noise" in batch else normal(backend, 5, 2)
            return fit(params, hparams, batch | {"x": batch["x"] + hparams["x"] * noise})

        return loss

    @every_estimator
    def test_is_drawn_once_for_gradient_and_product(self, backend, noisy, estimator):
        backend.restore(backend.generator(seed=3))
        used = batches(1 if isinstance(estimator, hg.Greedy) else 3)
        held, after = [batch | {"noise": normal(backend, 5, 2)} for batch in used], surroundings()
        expected = estimate(backend, estimator, hg.Bilevel(noisy, fit), train=held)
        backend.restore(backend.generator(seed=3))
        found = estimate(backend, estimator, hg.Bilevel(noisy, fit))
        assert surroundings() == after
        assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        assert_array_equal(found.state.params["w"], expected.state.params["w"])

    @every_estimator
    @each_loss
    def test_an_error_puts_the_generator_back(self, backend, noisy, estimator, where, data):
        spoilt = {data: [batches()[0] | {"y": np.full(5, np.nan)}] * (3 if data == "train" else 1)}
        call = (estimate, backend, estimator, hg.Bilevel(noisy, noisy))
        assert refused(errors.NonFiniteError, ArithmeticError, *call, **spoilt).where == where

    @parametrize("every", [1, 4])
    def test_an_error_in_the_tuner_puts_the_generator_back(self, backend, noisy, every):
        run, good = hg.Tuner(hg.Bilevel(noisy, noisy), hg.Greedy(SGD), every=every).run, batches()[0]
        train = [good, good, good | {"y": good["y"] * np.nan}, good]
        call = (run, *arrays(backend, (weights(), strengths(), train, [good])), 4)
        assert refused(errors.NonFiniteError, ArithmeticError, *call).step == 2


@on_jax
class TestKeysInTheBatch:  # what a loss draws in JAX
    @every_estimator
    @parametrize("kind", ["key", "PRNGKey"])
    def test_serve_gradient_and_product(self, backend, estimator, kind):
        keys = [getattr(jax.random, kind)(k) for k in range(3)]
        drawn = lambda key: jax.random.normal(key, (5, 2))  # noqa: E731

        def noisy(params, hparams, batch):
            noise = batch["noise"] if "noise" in batch else drawn(batch["key"])
            return fit(params, hparams, batch | {"x": batch["x"] + hparams["x"] * noise})

        given = [batch | {"key": key} for batch, key in zip(batches(), keys, strict=True)]
        held = [batch | {"noise": np.asarray(drawn(key))} for batch, key in zip(batches(), keys, strict=True)]
        found = estimate(backend, estimator, hg.Bilevel(noisy, fit), train=given)
        expected = estimate(NUMPY, estimator, hg.Bilevel(noisy, fit), train=held)
        assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-10)
        assert_allclose(found.state.params["w"], expected.state.params["w"], rtol=1e-10)


class TestExhaustedBatches:
    @every_estimator
    @each_loss
    @parametrize("kind", [list, iter])
    def test_none_at_all(self, backend, estimator, where, data, kind):
        call = (estimate, backend, estimator)
        says(refused(errors.ArgumentError, ValueError, *call, **{data: kind([])}), where)

    @each_tape
    @parametrize("kind", [list, iter])
    def test_fewer_than_the_steps(self, backend, tape, kind):
        call = (estimate, backend, hg.Unrolled(SGD, steps=3, tape=tape))
        train = kind(arrays(backend, batches(2)))
        says(refused(errors.ArgumentError, ValueError, *call, train=train), "T1", "2", "3")

    @each_loss
    @parametrize("bad", [lambda given: iter(given[:2]), lambda given: []], ids=["iterator", "empty-list"])
    @parametrize("estimator", [hg.Greedy(SGD), hg.Unrolled(SGD, steps=2)], ids=repr)
    def test_in_the_tuner(self, backend, where, data, bad, estimator):
        given = arrays(backend, {"params": weights(), "hparams": strengths(), "train": batches()})
        before = seen(backend, given)
        run, runs = hg.Tuner(RIDGE, estimator, every=1).run, given | {"val": given["train"]}
        runs |= {data: bad(given["train"])}
        says(refused(errors.ArgumentError, ValueError, run, **runs, steps=8), where)
        assert seen(backend, given) == before


class TestThreads:
    def test_are_independent(self, backend):
        many = affordable(backend, (ESTIMATORS, range(10)), (CHEAP, range(2)))
        filters, cases = list(warnings.filters), list(itertools.product(*many))
        shifted = lambda k: {"x": strengths()["x"] + 0.1 * k}  # noqa: E731
        one = lambda case: estimate(backend, case[0], hparams=shifted(case[1])).hypergradient["x"]  # noqa: E731
        serial = [one(case) for case in cases]
        with ThreadPoolExecutor(8) as pool:
            assert_array_equal(list(pool.map(one, cases)), serial)
        assert list(warnings.filters) == filters


def tied(params, hparams, batch):
    hidden = batch["x"] * params["w"]
    return ((hidden / (1.0 + hidden**2) @ params["w"] - batch["y"]) ** 2).mean()


class TestTiedParameters:
    problem = hg.Bilevel(lambda p, h, b: tied(p, h, b) + (1.0 + h["x"]) ** 2 @ p["w"] ** 2, tied)

    @plain_training
    def test_one_leaf_used_twice_by_central_differences(self, backend, steps, tape):
        is_right(backend, self.problem, steps, tape, batches()[1])

    @every_estimator
    def test_one_array_in_two_places_is_two_parameters(self, backend, estimator):
        outer = lambda p, h, b: fit({"w": p["a"] * p["b"]}, h, b)  # noqa: E731
        penalty = lambda p, h: (1.0 + h["a"] ** 2) @ p["a"] ** 2 + (2.0 - h["b"]) @ p["b"] ** 2  # noqa: E731
        problem = hg.Bilevel(lambda p, h, b: outer(p, h, b) + penalty(p, h), outer)
        w, copy = (backend.asarray(weights()["w"]) for _ in range(2))
        shared, apart = {"a": w, "b": w}, {"a": w, "b": copy}
        found, expected = (
            estimate(backend, estimator, problem, params=tree, hparams=tree) for tree in (shared, apart)
        )
        for leaf in "ab":
            assert_array_equal(found.hypergradient[leaf], expected.hypergradient[leaf])
            assert_array_equal(found.state.params[leaf], expected.state.params[leaf])
        assert not np.array_equal(found.hypergradient["a"], found.hypergradient["b"])


@on_torch
class TestModesOfTorch:
    @every_estimator
    @each_tree
    def test_inference_tensors_are_refused(self, backend, estimator, tree, leaf):
        with torch.inference_mode():
            inside = {tree: {leaf: torch.full((2,), 0.5, dtype=torch.float64)}}
        call = (errors.DisconnectedError, ValueError, estimate, backend, estimator)
        says(refused(*call, **inside), "inference_mode", "clone()")
        with torch.inference_mode():
            says(refused(*call), "inference_mode", "no_grad")

    @every_estimator
    def test_under_no_grad_nothing_changes(self, backend, estimator):
        expected = estimate(backend, estimator)
        with torch.no_grad():
            found = estimate(backend, estimator)
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        assert_array_equal(found.state.params["w"], expected.state.params["w"])

    @every_estimator
    def test_leaves_that_require_gradients_get_none(self, backend, estimator):
        given = arrays(backend, {"params": weights(), "hparams": strengths()})
        for leaf in optree.tree_leaves(given):
            leaf.requires_grad_()
        found, expected = estimate(backend, estimator, **given), estimate(backend, estimator)
        assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        assert all(leaf.grad is None for leaf in optree.tree_leaves(given))
        spoilt = [batches()[0] | {"y": np.full(5, np.nan)}] * 3
        call = (estimate, backend, estimator)
        refused(errors.NonFiniteError, ArithmeticError, *call, train=spoilt, **given)

    @parametrize("response", ["update", "gradient"])
    @parametrize("every", [1, 2])
    def test_a_run_from_leaves_that_require_gradients_keeps_no_graph(self, backend, response, every):
        params, hparams, train = arrays(backend, (weights(), strengths(), batches()))
        for leaf in (params["w"], hparams["x"]):
            leaf.requires_grad_()
        done = hg.Tuner(RIDGE, hg.Greedy(SGD, response), every=every).run(params, hparams, train, train, 4)
        assert not (done.params["w"].requires_grad or done.hparams["x"].requires_grad)


def through(f):
    """T1 with f between the parameters and the fit, and noise of learned strength before it."""
    noisy = lambda p, h, b: f(p["w"] + h["x"] * b["x"][0])  # noqa: E731
    return hg.Bilevel(lambda p, h, b: fit({"w": noisy(p, h, b)}, h, b) + (p["w"] ** 2).sum(), fit)


def attend(x, kernel=None):
    """Attention of a short sequence to itself: in a kernel of torch's, or by its definition."""
    q = torch.stack([x, x**2, x**3])
    if kernel is None:
        return (torch.softmax(q @ q.T / 2**0.5, -1) @ q)[0]
    with torch.nn.attention.sdpa_kernel(kernel):
        return torch.nn.functional.scaled_dot_product_attention(*[q[None, None]] * 3)[0, 0, 0]


@on_torch
class TestWithoutSecondDerivative:
    @staticmethod
    def is_refused(backend, estimator, f, *parts):
        call = (estimate, backend, estimator, through(f))
        says(refused(errors.UnsupportedOpError, NotImplementedError, *call), *parts)

    @every_estimator
    def test_fused_attention(self, backend, estimator):
        kernels = torch.nn.attention.SDPBackend
        fused = lambda x: attend(x, kernels.FLASH_ATTENTION)  # noqa: E731
        self.is_refused(backend, estimator, fused, "attention", "SDPBackend.MATH")
        found = estimate(backend, estimator, through(lambda x: attend(x, kernels.MATH)))
        expected = estimate(backend, estimator, through(attend))
        assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-10)

    @every_estimator
    def test_fused_attention_in_t2_which_needs_none(self, backend, estimator):
        kernels = torch.nn.attention.SDPBackend
        found, expected = (
            estimate(backend, estimator, hg.Bilevel(ridge, lambda p, h, b, k=k: attend(p["w"], k).sum()))
            for k in (kernels.FLASH_ATTENTION, None)
        )
        assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-10)

    @every_estimator
    def test_a_function_that_is_once_differentiable(self, backend, estimator):
        class Cube(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**3

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                return 3.0 * g * x**2

        self.is_refused(backend, estimator, Cube.apply, "Cube", "once_differentiable")

    @every_estimator
    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch's compiler hides otherwise
    def test_a_compiled_module(self, backend, estimator):
        compiled = torch.compile(torch.nn.Tanh(), backend="aot_eager")
        self.is_refused(backend, estimator, compiled, "torch.compile", "_orig_mod")
