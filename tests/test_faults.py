"""What comes of each fault, on the NumPy backend: the right error, by name, and nothing half done."""

import itertools
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import autograd
import autograd.numpy as np
import numpy as onp
import pytest
from autograd.tracer import getval
from numpy.testing import assert_allclose, assert_array_equal

import hypergrad as hg
from hypergrad import errors

parametrize, SOLVERS = pytest.mark.parametrize, [hg.CG(), hg.Direct(), hg.Neumann(), hg.Identity()]
SGD, HEAVY, TAPES = hg.SGD(0.05), hg.SGD(0.05, momentum=0.5), [hg.Full(), hg.States()]
ESTIMATORS = [hg.Greedy(HEAVY), hg.Greedy(SGD, "gradient"), hg.Greedy(hg.Adam(eps=0.1), lookahead=False)]
ESTIMATORS += [hg.Unrolled(u, 3, cut, tape) for u in (SGD, HEAVY) for cut in (None, 2) for tape in TAPES]
ESTIMATORS += [hg.Implicit(solver, tolerance=1e9) for solver in SOLVERS]  # every point counts as an optimum
every_estimator = parametrize("estimator", ESTIMATORS, ids=repr)
each_tape = parametrize("tape", TAPES, ids=repr)
every_rule = parametrize("train_by", [hg.Greedy, *(lambda u, t=t: hg.Unrolled(u, 3, tape=t) for t in TAPES)])
plain_training = parametrize("steps, tape", [(1, None), (3, hg.Full()), (3, hg.States())], ids=repr)
each_loss = parametrize("where, data", [("T1", "train"), ("T2", "val")])
each_tree = parametrize("tree, leaf", [("params", "w"), ("hparams", "x")])
STILL = [{"x": onp.zeros((5, 2)), "y": onp.zeros(5)}] * 3  # batches that leave a zero where it is


def batches(count=3, dtype=float):
    rng = onp.random.default_rng(0)
    draw = [(rng.normal(size=(5, 2)), rng.normal(size=5)) for _ in range(count)]
    return [{"x": x.astype(dtype), "y": y.astype(dtype)} for x, y in draw]


def weights(dtype=float):
    return {"w": onp.array([0.3, -0.7], dtype)}


def log_l2(dtype=float):
    return {"x": onp.array([-1.0, 0.5], dtype)}


def fit(params, hparams, batch):
    return np.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def ridge(params, hparams, batch):
    return fit(params, hparams, batch) + np.sum(np.exp(hparams["x"]) * params["w"] ** 2)


RIDGE = hg.Bilevel(inner=ridge, outer=fit)


def losses(where, loss):
    """Put a faulty loss on T1 or T2, and a sound one on the other."""
    return hg.Bilevel(loss, fit) if where == "T1" else hg.Bilevel(ridge, loss)


def estimate(estimator, problem=RIDGE, **given):
    """Estimate, and see that whether it fails or not every input is bit for bit what it was."""
    given = {"params": weights(), "hparams": log_l2(), "train": batches(), "val": batches()[0]} | given
    params, hparams, train, val = given.values()
    before, state, kept = pickle.dumps((params, hparams)), None, pickle.dumps(None)
    try:
        state = estimator.init(problem, params, hparams)
        kept = pickle.dumps(state)
        return estimator.estimate(problem, state, hparams, train, val)
    finally:
        assert pickle.dumps((params, hparams)) == before
        assert pickle.dumps(state) == kept


def refused(error, built_in, call, *args, **kwargs):
    """Call what must fail; return the error, after seeing that the global generator did not move."""
    onp.random.seed(5)
    drawn = onp.random.normal(size=3), pickle.dumps(onp.random.get_state())
    with onp.errstate(all="ignore"), pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, hg.HypergradError) and isinstance(caught.value, built_in)
    assert pickle.dumps(onp.random.get_state()) == drawn[1]
    return caught.value


def says(error, *parts):
    assert [part for part in parts if part not in str(error)] == [], f"missing from:\n{error}"


def is_right(problem, steps, tape, val):
    """Compare with central differences of gradient descent by hand."""

    def outer(x):
        w = weights()["w"]
        for batch in batches()[:steps]:
            w = w - 0.05 * autograd.grad(lambda u, b=batch: problem.inner({"w": u}, {"x": x}, b))(w)
        return problem.outer({"w": w}, {"x": x}, val)

    estimator = hg.Greedy(SGD) if tape is None else hg.Unrolled(SGD, steps, tape=tape)
    truth = [(outer(log_l2()["x"] + d) - outer(log_l2()["x"] - d)) / 2e-5 for d in 1e-5 * onp.eye(2)]
    assert_allclose(estimate(estimator, problem, val=val).hypergradient["x"], truth, rtol=1e-6)


def solve(solver, hessian, **options):
    """Where ∇C̃1 = 0 and ∇C2 = (1, 1, …): the sum of H⁻¹ ∇C2 as the estimate has it, and the report."""
    inner = lambda p, h, b: 0.5 * p["w"] @ hessian @ p["w"] + h["x"] * np.sum(p["w"])  # noqa: E731
    start = {"params": {"w": onp.zeros(len(hessian))}, "hparams": {"x": onp.array(0.0)}, "train": [None]}
    problem = hg.Bilevel(inner, lambda p, h, b: np.sum(p["w"]))
    out = estimate(hg.Implicit(solver, **options), problem, **start)
    return -out.hypergradient["x"], out.report


def unsolved(solver, hessian):
    return refused(errors.SolveError, ArithmeticError, solve, solver, hessian)


def rotated(*eigenvalues):
    q, _ = onp.linalg.qr(onp.random.default_rng(1).normal(size=(len(eigenvalues),) * 2))
    return q @ onp.diag(eigenvalues) @ q.T


class TestLinearSolve:
    @parametrize("solver", SOLVERS[:2], ids=repr)
    @parametrize("scale", [1e-6, 1.0, 1e6])
    @parametrize("hessian", [onp.diag([1.0, 0.0]), rotated(3.0, 2.0, 1.0, 0.0)], ids=["2", "4"])
    def test_singular(self, solver, scale, hessian):
        error = unsolved(solver, scale * hessian)
        assert error.reason == "singular" and error.residual > 1e-3
        says(error, "damping")
        with pytest.warns(errors.SolveWarning, match="damping"):
            assert solve(solver, scale * hessian, on_failure="warn")[1].residual > 1e-3

    def test_singular_but_damped_or_consistent(self):
        assert_allclose(solve(hg.CG(), onp.diag([1.0, 0.0]), damping=0.1)[0], 1 / 1.1 + 1 / 0.1, rtol=1e-9)
        assert_allclose(solve(hg.CG(), onp.ones((2, 2)))[0], 1.0, rtol=1e-12)

    @parametrize("solver", SOLVERS[:2], ids=repr)
    @parametrize("eigenvalues", [(2.0, -1.0), (1.0, -1.0), (-1.0, -1.0), (3.0, 2.0, -1.0)], ids=repr)
    def test_indefinite(self, solver, eigenvalues):
        for hessian in (onp.diag(eigenvalues), rotated(*eigenvalues)):
            error = unsolved(solver, hessian)
            assert error.reason == "negative_curvature" and 1 <= error.step <= len(hessian)
            says(error, "damping")
            unsolved(hg.Neumann(100, 0.1, rtol=1e-6), hessian)

    def test_out_of_steps_gives_the_true_residual(self):
        hessian, v = rotated(1.0, 2.0, 5.0, 9.0, 20.0), onp.ones(5)
        krylov = onp.stack([v, hessian @ v], axis=1)  # the x of CG minimises over this space
        left = v - hessian @ krylov @ onp.linalg.solve(krylov.T @ hessian @ krylov, krylov.T @ v)
        error = unsolved(hg.CG(max_steps=2), hessian)
        assert (error.reason, error.step) == ("max_steps", 2)
        assert_allclose(error.residual, onp.linalg.norm(left) / onp.linalg.norm(v), rtol=1e-9)
        says(error, "max_steps", "damping", "on_failure", f"{error.residual:.1e}")
        left, error = v - 0.05 * hessian @ v, unsolved(hg.Neumann(1, 0.05, 1e-6), hessian)
        assert (error.reason, error.step) == ("max_steps", 1)
        assert_allclose(error.residual, onp.linalg.norm(left) / onp.linalg.norm(v), rtol=1e-9)

    def test_the_residual_of_the_recurrence_is_not_believed(self):
        assert unsolved(hg.CG(1000, rtol=1e-15), rotated(*onp.logspace(0, 10, 12))).residual > 1e-15

    def test_neumann_diverges(self):
        error = unsolved(hg.Neumann(100, 1.0), onp.diag([1.0, 10.0]))
        assert error.reason == "diverged" and error.step <= 4
        numbers = [float(n) for n in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", str(error))]
        assert any(abs(n - 0.2) < 0.01 for n in numbers), f"the stable step 2/λmax = 0.2 is not in:\n{error}"
        assert_allclose(solve(hg.Neumann(400, 0.19, 1e-9), onp.diag([1.0, 10.0]))[0], 1.1, rtol=1e-7)


class TestNonFiniteLoss:
    @every_estimator
    @each_loss
    @parametrize("bad", [onp.nan, onp.inf])
    def test_says_in_which_loss(self, estimator, where, data, bad):
        spoilt = {data: [batches()[0] | {"y": onp.full(5, bad)}] * (3 if data == "train" else 1)}
        error = refused(errors.NonFiniteError, ArithmeticError, estimate, estimator, **spoilt)
        assert (error.where, error.path) == (where, None) and (where == "T2" or error.step == 0)
        says(error, where)

    @each_tape
    @parametrize("first", [0, 3])
    def test_says_at_which_training_step(self, tape, first):
        estimator, good = hg.Unrolled(SGD, steps=3, tape=tape), batches()[0]
        state = estimator.init(RIDGE, weights(), log_l2())._replace(step=first)
        train = [good | {"y": good["y"] * (onp.nan if t == first + 1 else 1.0)} for t in range(6)].__getitem__
        call = (estimator.estimate, RIDGE, state, log_l2(), train, good)
        error = refused(errors.NonFiniteError, ArithmeticError, *call)
        assert (error.where, error.step) == ("T1", first + 1)

    def test_in_the_steps_that_the_tuner_trains_alone(self):
        params, hparams, good = weights(), log_l2(), batches()[0]
        train = [good, good | {"y": good["y"] * onp.nan}, good, good]
        call = (hg.Tuner(RIDGE, hg.Greedy(SGD), every=4).run, params, hparams, train, [good], 4)
        error = refused(errors.NonFiniteError, ArithmeticError, *call)
        assert (error.where, error.step) == ("T1", 1)
        assert pickle.dumps((params, hparams)) == pickle.dumps((weights(), log_l2()))


class TestNonFiniteDerivative:
    @every_estimator
    @each_loss
    @each_tree
    def test_of_a_square_root_at_zero(self, estimator, where, data, tree, leaf):
        root = {"params": lambda p, h: p["w"][0] ** 0.5, "hparams": lambda p, h: p["w"][1] * h["x"][0] ** 0.5}
        trees = {"train": STILL, tree: {leaf: onp.array([0.0, 0.5])}}
        call = (estimate, estimator, losses(where, lambda p, h, b: ridge(p, h, b) + root[tree](p, h)))
        error = refused(errors.NonFiniteError, ArithmeticError, *call, **trees)
        assert (error.where, error.path) == (where, f"{tree}['{leaf}']")
        says(error, where, error.path)

    @each_tape
    def test_of_adam_without_epsilon(self, tape):
        estimator = hg.Unrolled(hg.Adam(0.1, eps=lambda h: h["eps"]), steps=3, tape=tape)
        trees = {"params": {"w": onp.zeros(2)}, "hparams": log_l2() | {"eps": onp.array(0.0)}, "train": STILL}
        error = refused(errors.NonFiniteError, ArithmeticError, estimate, estimator, **trees)
        says(error, error.path)
        trees["hparams"]["eps"] = onp.array(1e-8)
        assert onp.all(onp.isfinite(estimate(estimator, **trees).hypergradient["x"]))


class TestImplicitAwayFromTheOptimum:
    def test_warns_or_fails_with_the_gradient_norm_and_the_tolerance(self):
        batch = batches()[0]
        norm = onp.linalg.norm(autograd.grad(lambda w: ridge({"w": w}, log_l2(), batch))(weights()["w"]))
        with pytest.warns(errors.InnerNotConvergedWarning) as caught:
            out = estimate(hg.Implicit(hg.CG(), tolerance=1e-3, strict=False), train=batch)
        strict = hg.Implicit(hg.CG(), tolerance=1e-3, strict=True)
        error = refused(errors.InnerNotConvergedError, ArithmeticError, estimate, strict, train=batch)
        assert_allclose([out.report.inner_gradient_norm, error.gradient_norm], norm, rtol=1e-12)
        assert error.tolerance == 1e-3
        for message in (caught[0].message, error):
            says(message, f"{norm:.1e}", "1.0e-03")


class TestUnusedHyperparameter:
    hparams = log_l2() | {"unused": onp.ones(3)}

    @every_estimator
    def test_is_named_or_allowed_and_zero(self, estimator):
        error = refused(errors.DisconnectedError, ValueError, estimate, estimator, hparams=self.hparams)
        assert error.path == "hparams['unused']"
        says(error, "hparams['unused']", "allow_unused")
        out = estimate(type(estimator)(**vars(estimator) | {"allow_unused": True}), hparams=self.hparams)
        assert_array_equal(out.hypergradient["unused"], onp.zeros(3), strict=True)
        assert_array_equal(out.hypergradient["x"], estimate(estimator).hypergradient["x"])

    @every_estimator
    def test_is_decided_by_the_graph_and_not_by_a_zero(self, estimator):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, h, b) + 0.0 * np.sum(h["unused"]) * p["w"][0], fit)
        assert_array_equal(estimate(estimator, problem, hparams=self.hparams)[0]["unused"], onp.zeros(3))

    def test_a_learning_rate_has_no_part_in_the_literal_equation(self):
        literal, hparams = hg.Greedy(hg.SGD(lambda h: h["lr"]), "gradient"), log_l2() | {"lr": onp.array(0.1)}
        error = refused(errors.DisconnectedError, ValueError, estimate, literal, hparams=hparams)
        assert error.path == "hparams['lr']"


class TestHyperparameterOfOneRole:
    @plain_training
    def test_in_t1_only_is_right_by_central_differences(self, steps, tape):
        is_right(RIDGE, steps, tape, batches()[0])

    @every_estimator
    def test_in_t1_only_is_valid_and_only_added_is_exactly_zero(self, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + np.sum(h["added"] ** 2)  # noqa: E731
        problem = hg.Bilevel(inner, lambda p, h, b: fit(p, h, b) + h["direct"] ** 2)
        hparams = log_l2() | {"added": onp.ones(3), "direct": onp.array(2.0)}
        found, _, _, _, report = estimate(estimator, problem, hparams=hparams)
        assert onp.all(found["x"] != 0.0) and found["direct"] == 4.0
        assert_array_equal(found["added"], onp.zeros(3), strict=True)
        assert report.responds == {"x": True, "added": False, "direct": False}
        assert all(type(responds) is bool for responds in report.responds.values())


class TestKindsOfLeaves:
    @every_estimator
    @each_tree
    @parametrize("dtype", ["int64", "uint8", "bool", "complex128"])
    def test_integer_boolean_and_complex_ones_are_refused(self, estimator, tree, leaf, dtype):
        given = {tree: {leaf: weights()["w"], "layers": [{"w": onp.ones(2, dtype)}]}}
        real = (errors.LeafTypeError, TypeError)
        kind = (errors.UnsupportedLeafError, NotImplementedError) if dtype == "complex128" else real
        error = refused(*kind, estimate, estimator, **given)
        says(error, f"{tree}['layers'][0]['w']", dtype, "relax" if kind == real else "complex")

    @every_estimator
    @parametrize("tree", ["params", "hparams"])
    @parametrize("empty", [{}, (), {"a": None}], ids=repr)
    def test_an_empty_tree_is_refused(self, estimator, tree, empty):
        one = lambda p, h, b: np.array(1.0)  # noqa: E731
        call = (estimate, estimator, hg.Bilevel(one, one))
        says(refused(errors.ArgumentError, ValueError, *call, **{tree: empty}), tree)

    @every_estimator
    def test_zero_size_leaves_work_and_none_is_no_leaf(self, estimator):
        inner = lambda p, h, b: ridge(p, h, b) + np.sum(p["void"]) ** 2 * np.sum(h["void"])  # noqa: E731
        params = weights() | {"void": onp.zeros((0, 3)), "none": None}
        hparams = log_l2() | {"void": onp.zeros(0), "none": None}
        found, state, *_ = estimate(estimator, hg.Bilevel(inner, fit), params=params, hparams=hparams)
        assert (found["none"], state.params["none"]) == (None, None)
        assert (found["void"].shape, state.params["void"].shape) == ((0,), (0, 3))
        assert_allclose(found["x"], estimate(estimator).hypergradient["x"], rtol=1e-12)

    @every_estimator
    def test_0d_leaves_work(self, estimator):
        inner = lambda p, h, b: np.sum((p - 1.0) ** 2 + h * p**2)  # noqa: E731
        problem = hg.Bilevel(inner, lambda p, h, b: np.sum((p + 1.0) ** 2))
        trees = [{"params": onp.full(s, 0.4), "hparams": onp.full(s, 0.5)} for s in [(), (1,)]]
        found, expected = (estimate(estimator, problem, **tree).hypergradient for tree in trees)
        assert isinstance(found, onp.ndarray) and found.shape == () and found != 0.0
        assert_allclose(found, expected[0], rtol=1e-12)


class TestDetached:
    @every_estimator
    @each_loss
    def test_parameters(self, estimator, where, data):
        problem = losses(where, lambda p, h, b: ridge({"w": getval(p["w"])}, h, b))
        error = refused(errors.DisconnectedError, ValueError, estimate, estimator, problem)
        assert error.path.startswith("params")
        says(error, where, error.path, "autograd")

    @every_estimator
    def test_a_hyperparameter(self, estimator):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, {"x": getval(h["x"])}, b), fit)
        error = refused(errors.DisconnectedError, ValueError, estimate, estimator, problem)
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
    def test_a_loss_is_a_scalar(self, estimator, where, data, shape):
        vector = lambda p, h, b: None if shape is None else ridge(p, h, b) * np.ones(shape)  # noqa: E731
        built_in = ValueError if shape else (ValueError, TypeError)
        error = refused(hg.HypergradError, built_in, estimate, estimator, losses(where, vector))
        says(error, where, *([str(shape), "()"] if shape else []))

    @every_rule
    @parametrize("change, parts", CHANGES.values(), ids=CHANGES)
    def test_an_update_keeps_them(self, train_by, change, parts):
        step = lambda g, m, p, h: change({"w": p["w"] - 0.1 * g["w"]}, m)  # noqa: E731
        call = (estimate, train_by((lambda p: onp.zeros(2), step)))
        says(refused(errors.ArgumentError, ValueError, *call), *parts)

    @every_rule
    def test_a_learning_rate_is_a_number(self, train_by):
        square, rule = lambda p, h, b: p["w"] ** 2, hg.SGD(lambda h: h["lr"])
        trees = {"params": {"w": onp.array(0.5)}, "hparams": {"lr": onp.full(3, 0.1)}}
        call = (estimate, train_by(rule), hg.Bilevel(square, square))
        says(refused(errors.ArgumentError, ValueError, *call, **trees), "(3,)", "()")

    def test_a_state_of_other_parameters(self):
        estimator = hg.Greedy(HEAVY)
        state = estimator.init(RIDGE, {"w": onp.zeros(3)}, log_l2())._replace(params=weights())
        call = (estimator.estimate, RIDGE, state, log_l2(), batches(), batches()[0])
        says(refused(errors.ArgumentError, ValueError, *call), "(2,)", "(3,)")


class TestDtypes:
    single = {"params": weights("f4"), "hparams": log_l2("f4"), "train": batches(3, "f4")}
    single |= {"val": batches(1, "f4")}
    MIXED = {
        "params-hparams": (single | {"hparams": log_l2()}, ["params['w']", "hparams['x']"]),
        "params": ({"params": weights() | {"b": onp.ones(1, "f4")}}, ["params['w']", "params['b']"]),
        "hparams": ({"hparams": log_l2() | {"b": onp.ones(1, "f4")}}, ["hparams['b']"]),
        "train": (single | {"train": batches(3)}, ["train['x']"]),
        "val": (single | {"val": batches(1)}, ["val['x']"]),
    }

    @every_estimator
    @parametrize("trees, paths", MIXED.values(), ids=MIXED)
    def test_mixed_ones_are_refused(self, estimator, trees, paths):
        b = lambda *trees: sum(np.sum(t["b"] ** 2) for t in trees if "b" in t)  # noqa: E731
        problem = hg.Bilevel(lambda p, h, batch: ridge(p, h, batch) + b(p, h), fit)
        error = refused(errors.LeafTypeError, TypeError, estimate, estimator, problem, **trees)
        says(error, "float32", "float64", *paths)

    @every_estimator
    def test_float32_stays_float32(self, estimator):
        out = estimate(estimator, **self.single)
        assert out.hypergradient["x"].dtype == out.state.params["w"].dtype == onp.float32
        assert_allclose(out.hypergradient["x"], estimate(estimator).hypergradient["x"], rtol=1e-3)

    @every_rule
    def test_an_update_that_upcasts_is_refused(self, train_by):
        pair = (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - g["w"] * onp.full(2, 0.1)}, s))
        error = refused(errors.LeafTypeError, TypeError, estimate, train_by(pair), **self.single)
        says(error, "params['w']", "float32", "float64")


def noisy(params, hparams, batch):
    noise = batch["noise"] if "noise" in batch else onp.random.normal(size=(5, 2))
    return fit(params, hparams, batch | {"x": batch["x"] + np.exp(hparams["x"]) * noise})


class TestNoiseInsideTheLoss:
    @every_estimator
    def test_is_the_same_draw_in_gradient_and_product(self, estimator):
        onp.random.seed(3)
        held = [batch | {"noise": onp.random.normal(size=(5, 2))} for batch in batches()]
        expected = estimate(estimator, hg.Bilevel(noisy, fit), train=held)
        onp.random.seed(3)
        found = estimate(estimator, hg.Bilevel(noisy, fit))
        assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        assert_array_equal(found.state.params["w"], expected.state.params["w"])

    @every_estimator
    @each_loss
    def test_an_error_puts_the_generator_back(self, estimator, where, data):
        spoilt = {data: [batches()[0] | {"y": onp.full(5, onp.nan)}] * (3 if data == "train" else 1)}
        call = (estimate, estimator, hg.Bilevel(noisy, noisy))
        assert refused(errors.NonFiniteError, ArithmeticError, *call, **spoilt).where == where

    @parametrize("every", [1, 4])
    def test_an_error_in_the_tuner_puts_the_generator_back(self, every):
        run, good = hg.Tuner(hg.Bilevel(noisy, noisy), hg.Greedy(SGD), every=every).run, batches()[0]
        train = [good, good, good | {"y": good["y"] * onp.nan}, good]
        call = (run, weights(), log_l2(), train, [good], 4)
        assert refused(errors.NonFiniteError, ArithmeticError, *call).step == 2


class TestExhaustedBatches:
    @every_estimator
    @each_loss
    @parametrize("kind", [list, iter])
    def test_none_at_all(self, estimator, where, data, kind):
        says(refused(errors.ArgumentError, ValueError, estimate, estimator, **{data: kind([])}), where)

    @each_tape
    @parametrize("kind", [list, iter])
    def test_fewer_than_the_steps(self, tape, kind):
        call = (estimate, hg.Unrolled(SGD, steps=3, tape=tape))
        says(refused(errors.ArgumentError, ValueError, *call, train=kind(batches(2))), "T1", "2", "3")

    @each_loss
    @parametrize("bad", [lambda: iter(batches(2)), list], ids=["iterator", "empty-list"])
    @parametrize("estimator", [hg.Greedy(SGD), hg.Unrolled(SGD, steps=2)], ids=repr)
    def test_in_the_tuner(self, where, data, bad, estimator):
        params, hparams, given = weights(), log_l2(), {"train": batches(), "val": batches(), data: bad()}
        call = (hg.Tuner(RIDGE, estimator, every=1).run, params, hparams)
        says(refused(errors.ArgumentError, ValueError, *call, **given, steps=8), where)
        assert pickle.dumps((params, hparams)) == pickle.dumps((weights(), log_l2()))


class TestThreads:
    def test_are_independent(self):
        filters, cases = list(warnings.filters), list(itertools.product(ESTIMATORS, range(10)))
        one = lambda case: estimate(case[0], hparams={"x": log_l2()["x"] + 0.1 * case[1]})[0]["x"]  # noqa: E731
        serial = [one(case) for case in cases]
        with ThreadPoolExecutor(8) as pool:
            assert_array_equal(list(pool.map(one, cases)), serial)
        assert list(warnings.filters) == filters


def tied(params, hparams, batch):
    return np.mean((np.tanh(batch["x"] * params["w"]) @ params["w"] - batch["y"]) ** 2)


class TestTiedParameters:
    problem = hg.Bilevel(lambda p, h, b: tied(p, h, b) + np.exp(h["x"]) @ p["w"] ** 2, tied)

    @plain_training
    def test_one_leaf_used_twice_by_central_differences(self, steps, tape):
        is_right(self.problem, steps, tape, batches()[1])

    @every_estimator
    def test_one_array_in_two_places_is_two_parameters(self, estimator):
        outer = lambda p, h, b: fit({"w": p["a"] * p["b"]}, h, b)  # noqa: E731
        penalty = lambda p, h: np.exp(h["a"]) @ p["a"] ** 2 + np.exp(2.0 * h["b"]) @ p["b"] ** 2  # noqa: E731
        problem, w = hg.Bilevel(lambda p, h, b: outer(p, h, b) + penalty(p, h), outer), weights()["w"]
        shared = {"params": {"a": w, "b": w}, "hparams": {"a": w, "b": w}}
        apart = {"params": {"a": w, "b": w.copy()}, "hparams": {"a": w, "b": w.copy()}}
        found, expected = (estimate(estimator, problem, **trees) for trees in (shared, apart))
        for leaf in "ab":
            assert_array_equal(found.hypergradient[leaf], expected.hypergradient[leaf])
            assert_array_equal(found.state.params[leaf], expected.state.params[leaf])
        assert not onp.array_equal(found.hypergradient["a"], found.hypergradient["b"])
