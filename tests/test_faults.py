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

import hypergrad as hg
from hypergrad import errors

SGD = hg.SGD(0.05)
ANYWHERE = 1e9  # a tolerance under which every point counts as an inner optimum

TRAINERS = {
    "greedy": hg.Greedy(hg.SGD(0.05, momentum=0.5)),
    "greedy-gradient": hg.Greedy(SGD, response="gradient"),
    "greedy-no-lookahead": hg.Greedy(hg.Adam(0.05), lookahead=False),
    "unrolled-full": hg.Unrolled(SGD, steps=3, tape=hg.Full()),
    "unrolled-states": hg.Unrolled(hg.SGD(0.05, momentum=0.5), steps=3, tape=hg.States()),
    "unrolled-truncated": hg.Unrolled(SGD, steps=3, truncate=2),
}
SOLVES = {
    "implicit-cg": hg.Implicit(hg.CG(), tolerance=ANYWHERE),
    "implicit-direct": hg.Implicit(hg.Direct(), tolerance=ANYWHERE),
    "implicit-neumann": hg.Implicit(hg.Neumann(), tolerance=ANYWHERE),
    "implicit-identity": hg.Implicit(hg.Identity(), tolerance=ANYWHERE),
}
TAPES = [hg.Full(), hg.States()]
T1_T2 = pytest.mark.parametrize("where", ["T1", "T2"])


def over(estimators):
    return pytest.mark.parametrize("estimator", estimators.values(), ids=estimators)


every_estimator = over(TRAINERS | SOLVES)
every_trainer = over(TRAINERS)


def batches(count=3, dtype=float):
    rng = onp.random.default_rng(0)
    return [
        {"x": rng.normal(size=(5, 2)).astype(dtype), "y": rng.normal(size=5).astype(dtype)}
        for _ in range(count)
    ]


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


def estimate(estimator, problem=RIDGE, params=None, hparams=None, train=None, val=None):
    """Estimate, and see that whether it fails or not every input is bit for bit what it was."""
    params = weights() if params is None else params
    hparams = log_l2() if hparams is None else hparams
    train = batches() if train is None else train
    val = batches()[0] if val is None else val
    given = pickle.dumps((params, hparams))
    state = kept = None
    try:
        state = estimator.init(problem, params, hparams)
        kept = pickle.dumps(state)
        return estimator.estimate(problem, state, hparams, train, val)
    finally:
        assert pickle.dumps((params, hparams)) == given
        assert state is None or pickle.dumps(state) == kept


def refused(error, also, call, *args, **kwargs):
    """Call what must fail; return the error, after seeing that the global generator did not move."""
    onp.random.seed(5)
    onp.random.normal(size=3)
    drawn = pickle.dumps(onp.random.get_state())
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, hg.HypergradError)
    assert isinstance(caught.value, also)
    assert pickle.dumps(onp.random.get_state()) == drawn
    return caught.value


def says(error, *parts):
    for part in parts:
        assert part in str(error), f"{part!r} is not in:\n{error}"


def central(value, x, step=1e-5):
    """Central differences of a scalar function of one array."""
    ups = [onp.reshape(e, x.shape) * step for e in onp.eye(x.size)]
    return onp.reshape([(value(x + up) - value(x - up)) / (2 * step) for up in ups], x.shape)


def outer_after(problem, steps, params, train, val):
    """T2's loss as a function of hparams['x'], after real gradient descent by hand."""

    def value(x):
        w = params["w"]
        for batch in train[:steps]:
            w = w - 0.05 * autograd.grad(lambda u, b=batch: problem.inner({"w": u}, {"x": x}, b))(w)
        return problem.outer({"w": w}, {"x": x}, val)

    return value


def implicit_dense(problem, params, hparams, batch, val):
    """−(∂²_λθ C̃1)ᵀ H⁻¹ ∇_θ C2 with explicit matrices."""
    w, x = params["w"], hparams["x"]
    slope = autograd.grad(lambda u, y: problem.inner({"w": u}, {"x": y}, batch))
    v = autograd.grad(lambda u: problem.outer({"w": u}, hparams, val))(w)
    return -autograd.jacobian(slope, 1)(w, x).T @ onp.linalg.solve(autograd.jacobian(slope, 0)(w, x), v)


# Rows 1 to 4: the linear solve. At w = 0, x = 0 the inner gradient is zero, the Hessian is H, the
# mixed derivative is `mixed`, and the right side is v.


def solve(solver, hessian, v, **options):
    hessian, v = onp.asarray(hessian, float), onp.asarray(v, float)
    mixed = onp.arange(1.0, v.size + 1)

    def inner(p, h, b):
        return 0.5 * p["w"] @ hessian @ p["w"] + h["x"] * (mixed @ p["w"])

    problem = hg.Bilevel(inner, lambda p, h, b: v @ p["w"])
    params, hparams = {"w": onp.zeros(v.size)}, {"x": onp.array(0.0)}
    out = estimate(hg.Implicit(solver, **options), problem, params, hparams, batches()[0])
    return out, lambda x: -mixed @ x


def rotated(eigenvalues):
    q, _ = onp.linalg.qr(onp.random.default_rng(1).normal(size=(len(eigenvalues),) * 2))
    return q @ onp.diag(eigenvalues) @ q.T


class TestSingularHessian:
    @pytest.mark.parametrize("solver", [hg.CG(), hg.Direct()], ids=repr)
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    @pytest.mark.parametrize("hessian", [onp.diag([1.0, 0.0]), rotated([3.0, 2.0, 1.0, 0.0])], ids=["2", "4"])
    def test_is_never_success(self, solver, scale, hessian):
        error = refused(errors.SolveError, Exception, solve, solver, scale * hessian, onp.ones(len(hessian)))
        assert error.reason == "singular"
        assert error.residual > 1e-3
        says(error, "damping")

    def test_the_remedy_works(self):
        hessian = onp.diag([1.0, 0.0])
        out, value = solve(hg.CG(), hessian, [1.0, 1.0], damping=0.1)
        expected = value(onp.linalg.solve(hessian + 0.1 * onp.eye(2), onp.ones(2)))
        onp.testing.assert_allclose(out.hypergradient["x"], expected, rtol=1e-9)

    def test_a_consistent_right_side_has_an_answer(self):
        out, value = solve(hg.CG(), onp.diag([2.0, 0.0]), [1.0, 0.0])
        onp.testing.assert_allclose(out.hypergradient["x"], value(onp.array([0.5, 0.0])), rtol=1e-12)

    def test_the_bias_can_be_accepted_knowingly(self):
        with pytest.warns(errors.SolveWarning, match="damping"):
            out, _ = solve(hg.CG(), onp.diag([1.0, 0.0]), [1.0, 1.0], on_failure="warn")
        assert out.report.residual > 1e-3


class TestIndefiniteHessian:
    @pytest.mark.parametrize("solver", [hg.CG(), hg.Direct()], ids=repr)
    @pytest.mark.parametrize(
        "hessian",
        [onp.diag([2.0, -1.0]), onp.diag([-1.0, -1.0]), rotated([3.0, 2.0, -1.0])],
        ids=["a", "b", "c"],
    )
    def test_is_never_success(self, solver, hessian):
        error = refused(errors.SolveError, Exception, solve, solver, hessian, onp.ones(len(hessian)))
        assert error.reason == "negative_curvature"
        assert 1 <= error.step <= len(hessian)
        says(error, "damping")

    def test_zero_curvature_in_a_direction_that_is_not_a_null_vector(self):
        error = refused(errors.SolveError, Exception, solve, hg.CG(), onp.diag([1.0, -1.0]), [1.0, 1.0])
        assert error.reason == "negative_curvature"

    def test_neumann_does_not_succeed_either(self):
        refused(
            errors.SolveError, Exception, solve, hg.Neumann(50, 0.1, 1e-6), onp.diag([1.0, -1.0]), [1.0, 1.0]
        )


class TestSolverOutOfSteps:
    hessian, v = rotated([1.0, 2.0, 5.0, 9.0, 20.0]), onp.ones(5)

    def test_cg_gives_the_true_residual(self):
        error = refused(errors.SolveError, Exception, solve, hg.CG(max_steps=2), self.hessian, self.v)
        krylov = onp.stack([self.v, self.hessian @ self.v], axis=1)  # CG's x minimises over this space
        x = krylov @ onp.linalg.solve(krylov.T @ self.hessian @ krylov, krylov.T @ self.v)
        assert (error.reason, error.step) == ("max_steps", 2)
        true = onp.linalg.norm(self.hessian @ x - self.v) / onp.linalg.norm(self.v)
        onp.testing.assert_allclose(error.residual, true, rtol=1e-9)
        says(error, "max_steps", "damping", "on_failure", f"{true:.1e}")

    def test_neumann_gives_the_true_residual(self):
        error = refused(errors.SolveError, Exception, solve, hg.Neumann(3, 0.05, 1e-6), self.hessian, self.v)
        left = onp.linalg.matrix_power(onp.eye(5) - 0.05 * self.hessian, 3) @ self.v
        assert error.reason == "max_steps"
        onp.testing.assert_allclose(
            error.residual, onp.linalg.norm(left) / onp.linalg.norm(self.v), rtol=1e-9
        )

    def test_the_residual_of_the_recurrence_is_not_believed(self):
        hessian = rotated(onp.logspace(0, 10, 12))
        error = refused(errors.SolveError, Exception, solve, hg.CG(1000, rtol=1e-15), hessian, onp.ones(12))
        assert error.residual > 1e-15


class TestNeumannDiverges:
    def test_is_found_within_three_growing_terms(self):
        error = refused(
            errors.SolveError, Exception, solve, hg.Neumann(100, 1.0), onp.diag([1.0, 10.0]), [1.0, 1.0]
        )
        assert error.reason == "diverged"
        assert error.step <= 4
        numbers = [float(n) for n in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", str(error))]
        assert any(abs(n - 0.2) < 0.01 for n in numbers), f"2/λmax = 0.2 is not in:\n{error}"

    def test_a_stable_step_does_not(self):
        out, value = solve(hg.Neumann(400, 0.19, 1e-9), onp.diag([1.0, 10.0]), [1.0, 1.0])
        onp.testing.assert_allclose(out.hypergradient["x"], value(onp.array([1.0, 0.1])), rtol=1e-7)


class TestNonFiniteLoss:
    @every_estimator
    @T1_T2
    @pytest.mark.parametrize("bad", [onp.nan, onp.inf])
    def test_says_in_which_loss(self, estimator, where, bad):
        spoilt = batches()[0] | {"y": onp.full(5, bad)}
        data = {"train" if where == "T1" else "val": [spoilt] * (3 if where == "T1" else 1)}
        with onp.errstate(all="ignore"):
            error = refused(errors.NonFiniteError, Exception, estimate, estimator, **data)
        assert (error.where, error.path) == (where, None)
        assert where == "T2" or error.step == 0
        says(error, where)

    @pytest.mark.parametrize("tape", TAPES, ids=repr)
    def test_says_at_which_training_step(self, tape):
        estimator, (good, *_) = hg.Unrolled(SGD, steps=3, tape=tape), batches()
        spoilt = good | {"y": onp.full(5, onp.nan)}
        assert (
            refused(errors.NonFiniteError, Exception, estimate, estimator, train=[good, spoilt, good]).step
            == 1
        )
        later = estimate(estimator).state
        train = lambda t: spoilt if t == 4 else good  # noqa: E731
        call = (estimator.estimate, RIDGE, later, log_l2(), train, good)
        assert refused(errors.NonFiniteError, Exception, *call).step == 4

    def test_in_the_steps_that_the_tuner_trains_alone(self):
        good, hparams, params = batches()[0], log_l2(), weights()
        given = pickle.dumps((params, hparams))
        train = lambda t: good | {"y": good["y"] * (onp.nan if t == 1 else 1.0)}  # noqa: E731
        tuner = hg.Tuner(RIDGE, hg.Greedy(SGD), every=4)
        error = refused(errors.NonFiniteError, Exception, tuner.run, params, hparams, train, [good], steps=4)
        assert (error.where, error.step) == ("T1", 1)
        assert pickle.dumps((params, hparams)) == given


class TestNonFiniteDerivative:
    @every_estimator
    @T1_T2
    def test_of_a_square_root_at_zero(self, estimator, where):
        def root(p, h, b):
            return ridge(p, h, b) + np.sum(np.sqrt(p["w"]))

        params = {"w": onp.array([0.0, 0.5]), "b": onp.array(1.0)}
        call = (estimate, estimator, losses(where, root), params)
        if where == "T2":  # the root is to be taken at zero: start where training does not move
            still = {"x": onp.zeros((5, 2)), "y": onp.zeros(5)}
            call = (*call, None, [still] * 3)
        with onp.errstate(all="ignore"):
            error = refused(errors.NonFiniteError, Exception, *call)
        assert (error.where, error.path) == (where, "params['w']")
        says(error, "params['w']", where)

    @every_estimator
    @T1_T2
    def test_by_a_hyperparameter(self, estimator, where):
        def root(p, h, b):
            return fit(p, h, b) + np.sum(p["w"] ** 2) * (1.0 + np.sum(np.sqrt(h["x"])))

        hparams = {"x": onp.zeros(2)}
        problem = (
            hg.Bilevel(root, fit)
            if where == "T1"
            else hg.Bilevel(lambda p, h, b: fit(p, h, b) + np.sum((1.0 + h["x"]) * p["w"] ** 2), root)
        )
        with onp.errstate(all="ignore"):
            error = refused(errors.NonFiniteError, Exception, estimate, estimator, problem, None, hparams)
        assert (error.where, error.path) == (where, "hparams['x']")

    @pytest.mark.parametrize("tape", TAPES, ids=repr)
    def test_of_adam_without_epsilon(self, tape):
        estimator = hg.Unrolled(hg.Adam(0.1, eps=lambda h: h["eps"]), steps=3, tape=tape)
        problem = hg.Bilevel(lambda p, h, b: np.sum(h["x"] * p["w"] ** 2), lambda p, h, b: np.sum(p["w"]))
        params, hparams = {"w": onp.zeros(2)}, {"x": onp.ones(2), "eps": onp.array(0.0)}
        with onp.errstate(all="ignore"):
            error = refused(errors.NonFiniteError, Exception, estimate, estimator, problem, params, hparams)
        assert error.path is not None
        says(error, error.path)

    @every_estimator
    def test_adam_at_a_zero_gradient_is_no_fault(self, estimator):
        params, still = {"w": onp.zeros(2)}, {"x": onp.ones((5, 2)), "y": onp.zeros(5)}
        out = estimate(estimator, RIDGE, params, None, [still] * 3)
        assert onp.all(onp.isfinite(out.hypergradient["x"]))


class TestImplicitAwayFromTheOptimum:
    params, batch = weights(), batches()[0]
    norm = onp.linalg.norm(autograd.grad(lambda w: ridge({"w": w}, log_l2(), batches()[0]))(weights()["w"]))

    def test_warns_with_the_gradient_norm_and_the_tolerance(self):
        with pytest.warns(errors.InnerNotConvergedWarning) as caught:
            out = estimate(hg.Implicit(hg.Direct(), tolerance=2e-3), train=self.batch)
        says(caught[0].message, f"{self.norm:.1e}", "2.0e-03")
        onp.testing.assert_allclose(out.report.inner_gradient_norm, self.norm, rtol=1e-12)

    def test_is_an_error_if_strict(self):
        strict = hg.Implicit(hg.Direct(), tolerance=1e-3, strict=True)
        error = refused(errors.InnerNotConvergedError, Exception, estimate, strict, train=self.batch)
        assert error.tolerance == 1e-3
        onp.testing.assert_allclose(error.gradient_norm, self.norm, rtol=1e-12)

    def test_is_silent_at_the_optimum(self):
        x, y = self.batch["x"], self.batch["y"]
        optimum = {"w": onp.linalg.solve(x.T @ x / 5 + onp.diag(onp.exp(log_l2()["x"])), x.T @ y / 5)}
        out = estimate(hg.Implicit(hg.Direct(), strict=True), params=optimum, train=self.batch)
        expected = implicit_dense(RIDGE, optimum, log_l2(), self.batch, self.batch)
        onp.testing.assert_allclose(out.hypergradient["x"], expected, rtol=1e-10)


class TestUnusedHyperparameter:
    hparams = log_l2() | {"unused": onp.ones(3)}

    @every_estimator
    def test_is_named(self, estimator):
        error = refused(errors.DisconnectedError, ValueError, estimate, estimator, hparams=self.hparams)
        assert error.path == "hparams['unused']"
        says(error, "hparams['unused']", "allow_unused")

    @every_estimator
    def test_may_be_allowed_and_is_zero(self, estimator):
        allowed = type(estimator)(**{**vars(estimator), "allow_unused": True})
        out = estimate(allowed, hparams=self.hparams)
        onp.testing.assert_array_equal(out.hypergradient["unused"], onp.zeros(3))
        onp.testing.assert_array_equal(out.hypergradient["x"], estimate(estimator).hypergradient["x"])

    @every_estimator
    def test_is_decided_by_the_graph_and_not_by_a_zero(self, estimator):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, h, b) + 0.0 * np.sum(h["unused"]) * p["w"][0], fit)
        out = estimate(estimator, problem, hparams=self.hparams)
        onp.testing.assert_array_equal(out.hypergradient["unused"], onp.zeros(3))

    def test_a_learning_rate_has_no_part_in_the_literal_equation(self):
        literal = hg.Greedy(hg.SGD(lambda h: h["lr"]), response="gradient")
        hparams = log_l2() | {"lr": onp.array(0.1)}
        error = refused(errors.DisconnectedError, ValueError, estimate, literal, hparams=hparams)
        assert error.path == "hparams['lr']"


class TestHyperparameterOfT1Only:
    @pytest.mark.parametrize(
        "steps, estimator",
        [(1, hg.Greedy(SGD)), *((3, hg.Unrolled(SGD, steps=3, tape=tape)) for tape in TAPES)],
    )
    def test_is_right_by_central_differences(self, steps, estimator):
        truth = central(outer_after(RIDGE, steps, weights(), batches(), batches()[0]), log_l2()["x"])
        onp.testing.assert_allclose(estimate(estimator).hypergradient["x"], truth, rtol=1e-6)

    @every_estimator
    def test_is_valid_without_a_warning(self, estimator):
        out = estimate(estimator)
        assert onp.all(out.hypergradient["x"] != 0.0)
        assert out.report.responds == {"x": True}
        assert out.report.direct_norm == 0.0


class TestHyperparameterOnlyAdded:
    @every_estimator
    def test_has_exact_zeros_and_the_report_says_so(self, estimator):
        problem = hg.Bilevel(
            lambda p, h, b: ridge(p, h, b) + np.sum(h["added"] ** 2),
            lambda p, h, b: fit(p, h, b) + np.sum(h["direct"] ** 2),
        )
        hparams = log_l2() | {"added": onp.ones(3), "direct": onp.array(2.0)}
        out = estimate(estimator, problem, hparams=hparams)
        onp.testing.assert_array_equal(out.hypergradient["added"], onp.zeros(3))
        onp.testing.assert_array_equal(out.hypergradient["direct"], 4.0)
        assert out.report.responds == {"x": True, "added": False, "direct": False}
        assert all(type(responds) is bool for responds in out.report.responds.values())


class TestKindsOfLeaves:
    @every_estimator
    @pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
    @pytest.mark.parametrize("tree", ["params", "hparams"])
    def test_integers_and_booleans_are_refused(self, estimator, dtype, tree):
        leaf = {"layers": [{"w": onp.ones(2, dtype)}]}
        trees = {"params": weights() | leaf} if tree == "params" else {"hparams": log_l2() | leaf}
        error = refused(errors.LeafTypeError, TypeError, estimate, estimator, **trees)
        says(error, f"{tree}['layers'][0]['w']", dtype, "relax")

    @every_estimator
    def test_integers_in_a_batch_are_fine(self, estimator):
        train = [batch | {"y": onp.array([0, 1, 2, 1, 0])} for batch in batches()]
        assert onp.all(onp.isfinite(estimate(estimator, train=train).hypergradient["x"]))

    @every_estimator
    @pytest.mark.parametrize(
        "trees",
        [{"params": {"w": onp.ones(2, complex)}}, {"hparams": {"x": onp.ones(2, complex)}}],
        ids=["params", "hparams"],
    )
    def test_complex_ones_are_refused(self, estimator, trees):
        error = refused(errors.UnsupportedLeafError, NotImplementedError, estimate, estimator, **trees)
        says(error, "params['w']" if "params" in trees else "hparams['x']", "complex")

    @every_estimator
    @pytest.mark.parametrize("tree", ["params", "hparams"])
    @pytest.mark.parametrize("empty", [{}, (), {"a": None}], ids=repr)
    def test_an_empty_tree_is_refused(self, estimator, tree, empty):
        problem = hg.Bilevel(lambda p, h, b: np.array(1.0), lambda p, h, b: np.array(1.0))
        says(refused(ValueError, ValueError, estimate, estimator, problem, **{tree: empty}), tree)

    @every_estimator
    def test_zero_size_leaves_work_and_none_is_no_leaf(self, estimator):
        def inner(p, h, b):
            return ridge(p, h, b) + np.sum(p["void"] ** 2) * np.sum(np.exp(h["void"]))

        params = weights() | {"void": onp.zeros((0, 3)), "none": None}
        hparams = log_l2() | {"void": onp.zeros(0), "none": None}
        out = estimate(estimator, hg.Bilevel(inner, fit), params, hparams)
        assert (out.hypergradient["none"], out.state.params["none"]) == (None, None)
        assert (out.hypergradient["void"].shape, out.state.params["void"].shape) == ((0,), (0, 3))
        expected = estimate(estimator).hypergradient["x"]
        onp.testing.assert_allclose(out.hypergradient["x"], expected, rtol=1e-12)

    @every_estimator
    def test_0d_leaves_work(self, estimator):
        problem = hg.Bilevel(lambda p, h, b: (p - 1.0) ** 2 + h * p**2, lambda p, h, b: (p + 1.0) ** 2)
        out = estimate(estimator, problem, onp.array(0.4), onp.array(0.5))
        stretched = hg.Bilevel(
            lambda p, h, b: np.sum((p - 1.0) ** 2 + h * p**2), lambda p, h, b: np.sum((p + 1.0) ** 2)
        )
        expected = estimate(estimator, stretched, onp.array([0.4]), onp.array([0.5])).hypergradient
        assert isinstance(out.hypergradient, onp.ndarray) and out.hypergradient.shape == ()
        assert out.hypergradient != 0.0
        onp.testing.assert_allclose(out.hypergradient, expected[0], rtol=1e-12)


class TestDetached:
    @every_estimator
    @T1_T2
    def test_parameters(self, estimator, where):
        problem = losses(where, lambda p, h, b: ridge({"w": getval(p["w"])}, h, b))
        error = refused(errors.DisconnectedError, ValueError, estimate, estimator, problem)
        assert error.path.startswith("params")
        says(error, where, "params", "autograd")

    @every_estimator
    def test_a_hyperparameter(self, estimator):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, {"x": getval(h["x"])}, b), fit)
        error = refused(errors.DisconnectedError, ValueError, estimate, estimator, problem)
        assert error.path == "hparams['x']"
        says(error, "hparams['x']", "autograd")


class TestShapesAndStructures:
    @every_estimator
    @T1_T2
    @pytest.mark.parametrize("shape", [(1,), (2,), (2, 3)])
    def test_a_loss_is_a_scalar(self, estimator, where, shape):
        problem = losses(where, lambda p, h, b: ridge(p, h, b) * np.ones(shape))
        error = refused(errors.ArgumentError, ValueError, estimate, estimator, problem)
        says(error, where, str(shape), "()")

    @every_estimator
    @T1_T2
    def test_a_loss_returns_something(self, estimator, where):
        problem = losses(where, lambda p, h, b: None)
        says(refused(hg.HypergradError, (ValueError, TypeError), estimate, estimator, problem), where)

    @pytest.mark.parametrize(
        "estimator", [hg.Greedy, *(lambda u, t=t: hg.Unrolled(u, 3, tape=t) for t in TAPES)]
    )
    @pytest.mark.parametrize(
        "change, parts",
        [
            (lambda new, m: ({"w": new["w"][:1]}, m), ["params['w']", "(2,)", "(1,)"]),
            (lambda new, m: ({"v": new["w"]}, m), ["params", "'w'", "'v'"]),
            (lambda new, m: (new, m[:1]), ["opt_state", "(2,)", "(1,)"]),
        ],
        ids=["shape", "key", "opt-state"],
    )
    def test_an_update_keeps_them(self, estimator, change, parts):
        def update(gradient, momentum, params, hparams):
            return change({"w": params["w"] - 0.1 * gradient["w"]}, momentum)

        pair = (lambda params: onp.zeros(2), update)
        says(refused(errors.ArgumentError, ValueError, estimate, estimator(pair)), *parts)

    def test_a_pair_that_keeps_them_works(self):
        pair = (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - 0.05 * g["w"]}, s))
        found, expected = (estimate(hg.Unrolled(u, 3)).hypergradient["x"] for u in (pair, SGD))
        onp.testing.assert_allclose(found, expected, rtol=1e-12)

    @pytest.mark.parametrize(
        "estimator", [hg.Greedy, *(lambda u, t=t: hg.Unrolled(u, 3, tape=t) for t in TAPES)]
    )
    def test_a_learning_rate_is_a_number(self, estimator):
        problem = hg.Bilevel(lambda p, h, b: np.sum(p["w"] ** 2), lambda p, h, b: np.sum(p["w"] ** 2))
        rule, params, rates = hg.SGD(lambda h: h["lr"]), {"w": onp.array(0.5)}, {"lr": onp.full(3, 0.1)}
        error = refused(errors.ArgumentError, ValueError, estimate, estimator(rule), problem, params, rates)
        says(error, "(3,)", "()")

    def test_a_state_of_other_parameters(self):
        estimator = hg.Greedy(hg.SGD(0.1, momentum=0.9))
        state = estimator.init(RIDGE, {"w": onp.zeros(3)}, log_l2())._replace(params=weights())
        call = (estimator.estimate, RIDGE, state, log_l2(), batches(), batches()[0])
        says(refused(errors.ArgumentError, ValueError, *call), "(2,)", "(3,)")


class TestDtypes:
    @every_estimator
    @pytest.mark.parametrize(
        "trees, paths",
        [
            ({"params": weights("float32"), "train": batches(3, "float32")}, ["params['w']", "hparams['x']"]),
            ({"params": {"w": weights()["w"], "b": onp.ones(1, "float32")}}, ["params['w']", "params['b']"]),
            ({"hparams": log_l2() | {"b": onp.ones(1, "float32")}}, ["hparams['b']"]),
            (
                {"params": weights("float32"), "hparams": log_l2("float32"), "val": batches(1, "float32")},
                ["['x']"],
            ),
            (
                {"params": weights("float32"), "hparams": log_l2("float32"), "train": batches(3, "float32")},
                ["['x']"],
            ),
        ],
        ids=["params-hparams", "within-params", "within-hparams", "train", "val"],
    )
    def test_mixed_ones_are_refused(self, estimator, trees, paths):
        def inner(p, h, b):
            return ridge(p, h, b) + sum(np.sum(tree["b"] ** 2) for tree in (p, h) if "b" in tree)

        error = refused(errors.LeafTypeError, TypeError, estimate, estimator, hg.Bilevel(inner, fit), **trees)
        says(error, "float32", "float64", *paths)

    @every_estimator
    def test_float32_stays_float32(self, estimator):
        data = batches(3, "float32")
        out = estimate(estimator, RIDGE, weights("float32"), log_l2("float32"), data, data[0])
        assert out.hypergradient["x"].dtype == out.state.params["w"].dtype == onp.float32
        expected = estimate(estimator).hypergradient["x"]
        onp.testing.assert_allclose(out.hypergradient["x"], expected, rtol=1e-3)

    def test_an_update_that_upcasts_is_refused(self):
        pair = (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - g["w"] * onp.full(2, 0.1)}, s))
        data = batches(3, "float32")
        call = (estimate, hg.Greedy(pair), RIDGE, weights("float32"), log_l2("float32"), data, data[0])
        says(refused(errors.LeafTypeError, TypeError, *call), "params['w']", "float32", "float64")


class TestNoiseInsideTheLoss:
    estimators = {
        "greedy": hg.Greedy(SGD),
        "greedy-gradient": hg.Greedy(SGD, response="gradient"),
        "full": hg.Unrolled(SGD, 3, tape=hg.Full()),
        "states": hg.Unrolled(SGD, 3, tape=hg.States()),
        "truncated": hg.Unrolled(SGD, 3, truncate=2, tape=hg.States()),
        "direct": hg.Implicit(hg.Direct(), tolerance=ANYWHERE),
        "cg": hg.Implicit(hg.CG(), tolerance=ANYWHERE),
    }

    @over(estimators)
    def test_is_the_same_draw_in_gradient_and_product(self, estimator):
        def noisy(p, h, b):
            noise = b["noise"] if "noise" in b else onp.random.normal(size=(5, 2))
            return fit(p, h, b | {"x": b["x"] + np.exp(h["x"]) * noise})

        problem, onward = hg.Bilevel(noisy, fit), batches()
        onp.random.seed(3)
        held = [batch | {"noise": onp.random.normal(size=(5, 2))} for batch in onward]
        expected = estimate(estimator, problem, train=held)
        onp.random.seed(3)
        found = estimate(estimator, problem, train=onward)
        onp.testing.assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        onp.testing.assert_array_equal(found.state.params["w"], expected.state.params["w"])


class TestExhaustedBatches:
    @every_estimator
    @T1_T2
    @pytest.mark.parametrize("none", [lambda: [], lambda: iter([])], ids=["list", "iterator"])
    def test_none_at_all(self, estimator, where, none):
        data = {"train" if where == "T1" else "val": none()}
        says(refused(errors.ArgumentError, ValueError, estimate, estimator, **data), where)

    @pytest.mark.parametrize("tape", TAPES, ids=repr)
    @pytest.mark.parametrize("kind", [list, iter])
    def test_fewer_than_the_steps(self, tape, kind):
        estimator = hg.Unrolled(SGD, steps=3, tape=tape)
        error = refused(errors.ArgumentError, ValueError, estimate, estimator, train=kind(batches(2)))
        says(error, "T1", "2", "3")

    @pytest.mark.parametrize(
        "where, train, val",
        [
            ("T1", lambda: iter(batches(2)), lambda: batches()),
            ("T2", lambda: batches(), lambda: iter(batches(2))),
            ("T1", lambda: [], lambda: batches()),
            ("T2", lambda: batches(), lambda: []),
        ],
        ids=["train-iterator", "val-iterator", "train-list", "val-list"],
    )
    @pytest.mark.parametrize(
        "estimator", [hg.Greedy(SGD), hg.Unrolled(SGD, steps=2)], ids=["greedy", "unrolled"]
    )
    def test_in_the_tuner(self, where, train, val, estimator):
        params, hparams = weights(), log_l2()
        given = pickle.dumps((params, hparams))
        run = hg.Tuner(RIDGE, estimator, every=1).run
        says(refused(errors.ArgumentError, ValueError, run, params, hparams, train(), val(), steps=8), where)
        assert pickle.dumps((params, hparams)) == given


class TestThreads:
    def test_are_independent(self):
        filters = list(warnings.filters)
        cases = [
            (e, {"x": log_l2()["x"] + 0.1 * k})
            for e, k in itertools.product((TRAINERS | SOLVES).values(), range(10))
        ]
        one = lambda case: estimate(case[0], hparams=case[1]).hypergradient["x"]  # noqa: E731
        serial = [one(case) for case in cases]
        with ThreadPoolExecutor(8) as pool:
            onp.testing.assert_array_equal(list(pool.map(one, cases)), serial)
        assert list(warnings.filters) == filters


class TestTiedParameters:
    problem = hg.Bilevel(
        lambda p, h, b: (
            np.mean((np.tanh(b["x"] * p["w"]) @ p["w"] - b["y"]) ** 2) + np.exp(h["x"]) @ p["w"] ** 2
        ),
        lambda p, h, b: np.mean((np.tanh(b["x"] * p["w"]) @ p["w"] - b["y"]) ** 2),
    )

    @pytest.mark.parametrize(
        "steps, estimator",
        [(1, hg.Greedy(SGD)), *((3, hg.Unrolled(SGD, steps=3, tape=tape)) for tape in TAPES)],
    )
    def test_one_leaf_used_twice_by_central_differences(self, steps, estimator):
        truth = central(outer_after(self.problem, steps, weights(), batches(), batches()[1]), log_l2()["x"])
        found = estimate(estimator, self.problem, val=batches()[1]).hypergradient["x"]
        onp.testing.assert_allclose(found, truth, rtol=1e-6)

    def test_one_leaf_used_twice_by_dense_matrices(self):
        truth = implicit_dense(self.problem, weights(), log_l2(), batches()[0], batches()[1])
        implicit = SOLVES["implicit-direct"]
        found = estimate(implicit, self.problem, train=batches()[0], val=batches()[1]).hypergradient["x"]
        onp.testing.assert_allclose(found, truth, rtol=1e-10)

    @every_estimator
    def test_one_array_in_two_places_is_two_parameters(self, estimator):
        def pair(p, h, b):
            reach = np.mean((b["x"] @ (p["a"] * p["b"]) - b["y"]) ** 2)
            return reach + np.exp(h["c"]) @ p["a"] ** 2 + 2.0 * np.exp(h["d"]) @ p["b"] ** 2

        problem = hg.Bilevel(pair, lambda p, h, b: fit({"w": p["a"] * p["b"]}, h, b))
        w, x = onp.array([0.3, -0.7]), onp.array([1.0, 1.5])
        shared = estimate(estimator, problem, {"a": w, "b": w}, {"c": x, "d": x})
        apart = estimate(estimator, problem, {"a": w, "b": w.copy()}, {"c": x, "d": x.copy()})
        for found, expected in zip(shared[:2], apart[:2], strict=True):
            assert pickle.dumps(found) or expected is None
        for name in "cd":
            onp.testing.assert_array_equal(shared.hypergradient[name], apart.hypergradient[name])
        assert not onp.array_equal(shared.hypergradient["c"], shared.hypergradient["d"])
