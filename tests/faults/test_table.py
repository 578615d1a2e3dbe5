"""The table of faults and what must come of each: for each row a test with its number, on each framework.

The other modules of this folder try the same faults in every form. Here each has one, so that a reader sees
the whole promise at a glance.
"""

import threading

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from support.faults import (
    RIDGE,
    SGD,
    batches,
    converted,
    estimate,
    fit,
    refused,
    ridge,
    says,
    strengths,
    surroundings,
    weights,
)
from support.frameworks import on_jax, on_torch, with_a_generator
from support.installed import jax, torch
from support.noise import normal

import hypergrad as hg
from hypergrad import errors
from hypergrad.tuning.interrupts import Interrupts

parametrize = pytest.mark.parametrize
GREEDY, UNROLLED = hg.Greedy(SGD), hg.Unrolled(SGD, 3)
IMPLICIT = hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=1e9))
SINGLE = {"params": weights("f4"), "hparams": strengths("f4"), "train": batches(3, "f4")}
SINGLE |= {"val": batches(1, "f4")[0]}


def rotated(eigenvalues):
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))
    return q @ np.diag(eigenvalues) @ q.T


def quadratic(backend, eigenvalues):
    """∇C̃1 = 0 and ∇C2 = (1, 1, …) at the origin, with this Hessian in other coordinates."""
    n, H = len(eigenvalues), backend.asarray(rotated(eigenvalues))
    inner = lambda p, h, b: 0.5 * p["w"] @ H @ p["w"] + h["x"] * p["w"].sum()  # noqa: E731
    start = {"params": {"w": np.zeros(n)}, "hparams": {"x": np.array(0.0)}, "train": [None]}
    return start | {"problem": hg.Bilevel(inner, lambda p, h, b: p["w"].sum())}


def unsolved(backend, eigenvalues, solver, **options):
    estimator, given = hg.Implicit(solver, **options), quadratic(backend, eigenvalues)
    return refused(errors.SolveError, ArithmeticError, estimate, backend, estimator, **given)


@parametrize("solver", [hg.CG(), hg.MINRES(), hg.GMRES(), hg.BiCGStab(), hg.Direct()], ids=repr)
def test_row_01_a_singular_hessian(backend, solver):
    error = unsolved(backend, (2.0, 1.0, 0.0), solver)
    assert error.reason == "singular" and error.residual > 1e-3
    says(error, "hg.Damped")


def test_row_02_an_indefinite_hessian(backend):
    error = unsolved(backend, (3.0, 2.0, -1.0), hg.CG())
    assert error.reason == "negative_curvature" and error.step >= 1


def test_row_03_a_solver_out_of_steps(backend):
    eigenvalues = (1.0, 4.0, 9.0)
    error, H, v = unsolved(backend, eigenvalues, hg.CG(max_steps=1)), rotated(eigenvalues), np.ones(3)
    left = v - H @ v * (v @ v) / (v @ H @ v)  # after one step of CG
    assert error.reason == "max_steps"
    assert_allclose(error.residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-9)


def test_row_04_a_neumann_series_that_diverges(backend):
    error = unsolved(backend, (1.0, 10.0), hg.Neumann(100, 1.0))
    assert error.reason == "diverged" and error.step <= 5
    says(error, "step_size < 2.0e-01")


@parametrize("where, data", [("T1", "train"), ("T2", "val")])
@parametrize("estimator", [GREEDY, UNROLLED], ids=repr)
def test_row_05_a_loss_that_is_not_finite(backend, where, data, estimator):
    bad = batches()[0] | {"y": np.full(5, np.nan)}
    given = {"train": [bad] * 3} if data == "train" else {"val": bad}
    error = refused(errors.NonFiniteError, ArithmeticError, estimate, backend, estimator, **given)
    assert error.where == where and error.path is None


def test_row_06_a_finite_loss_with_a_gradient_that_is_not(backend):
    root = hg.Bilevel(lambda p, h, b: ridge(p, h, b) + ((0.0 * p["w"] ** 2).sum()) ** 0.5, fit)
    error = refused(errors.NonFiniteError, ArithmeticError, estimate, backend, GREEDY, root)
    assert error.path == "params['w']"


@parametrize("name", ["torch", "jax"])
def test_row_07_an_overflow_in_half_precision(name):
    pytest.importorskip(name)
    backend = hg.backend.get_backend(name)
    half = lambda x: backend.cast(backend.asarray(np.array(x)), "float16")  # noqa: E731
    problem = hg.Bilevel(lambda p, h, b: (3e4 * p * h).sum(), lambda p, h, b: (p * p).sum())
    with pytest.raises(errors.NonFiniteError, match="float32"):
        hg.hypergradient(problem, half([9.0, 9.0]), half([9.0, 9.0]), [None], [None], GREEDY)


def test_row_08_an_implicit_estimate_away_from_the_optimum(backend):
    with pytest.warns(errors.InnerNotConvergedWarning, match="∇C̃1"):
        estimate(backend, hg.Implicit(hg.CG()))
    strict = hg.Implicit(hg.CG(), checks=hg.Checks(away="raise"))
    error = refused(errors.InnerNotConvergedError, ArithmeticError, estimate, backend, strict)
    assert error.gradient_norm > error.tolerance


@parametrize("estimator", [GREEDY, UNROLLED, IMPLICIT], ids=repr)
def test_row_09_a_hyperparameter_that_nothing_uses(backend, estimator):
    hparams = strengths() | {"unused": np.ones(3)}
    error = refused(errors.DisconnectedError, ValueError, estimate, backend, estimator, hparams=hparams)
    assert error.path == "hparams['unused']"
    allowing = type(estimator)(**vars(estimator) | {"allow_unused": True})
    assert_array_equal(estimate(backend, allowing, hparams=hparams).hypergradient["unused"], np.zeros(3))


@parametrize("estimator", [GREEDY, UNROLLED, IMPLICIT], ids=repr)
def test_row_10_a_hyperparameter_of_t1_alone(backend, estimator, recwarn):
    assert np.all(estimate(backend, estimator).hypergradient["x"] != 0.0)
    assert not recwarn.list


@parametrize("products", [hg.Exact(), hg.FiniteDifference()], ids=repr)
def test_row_11_a_hyperparameter_only_added_to_t1(backend, products):
    inner = lambda p, h, b: fit(p, h, b) + h["x"].sum()  # noqa: E731
    for estimator in (hg.Greedy(SGD, products=products), hg.Implicit(hg.CG(), products, IMPLICIT.checks)):
        with pytest.warns(errors.ZeroResponseWarning, match=r"hparams\['x'\]"):
            out = estimate(backend, estimator, hg.Bilevel(inner, fit))
        assert_array_equal(out.hypergradient["x"], np.zeros(2))
        assert not bool(out.report.reached["x"])


@parametrize("tree, leaf", [("params", "w"), ("hparams", "x")])
@parametrize("dtype", [int, bool])
def test_row_12_integers_and_booleans(backend, tree, leaf, dtype):
    given = {tree: {leaf: np.array([1, 0], dtype)}}
    error = refused(errors.LeafTypeError, TypeError, estimate, backend, GREEDY, **given)
    says(error, f"{tree}['{leaf}']", "relax")


def test_row_13_a_graph_that_is_cut(backend):
    cuts = {
        "numpy": backend.to_numpy,
        "torch": lambda x: x.detach(),
        "jax": lambda x: jax.lax.stop_gradient(x),
    }
    cut = hg.Bilevel(lambda p, h, b: ridge({"w": cuts[backend.name](p["w"])}, h, b), fit)
    error = refused(errors.DisconnectedError, ValueError, estimate, backend, GREEDY, cut)
    says(error, "detached", "params")


def test_row_14_trees_without_leaves_and_leaves_without_entries(backend):
    error = refused(errors.ArgumentError, ValueError, estimate, backend, GREEDY, hparams={})
    says(error, "hparams is an empty tree")
    out = estimate(backend, GREEDY, params=weights() | {"none": None, "empty": np.zeros((0, 2))})
    assert_array_equal(out.hypergradient["x"], estimate(backend, GREEDY).hypergradient["x"])


@parametrize("estimator", [GREEDY, UNROLLED, IMPLICIT], ids=repr)
def test_row_15_leaves_without_dimensions(backend, estimator):
    square = hg.Bilevel(
        lambda p, h, b: (p["w"] - h["x"]) ** 2 + 0.5 * p["w"] ** 2, lambda p, h, b: (p["w"] - 1.0) ** 2
    )
    given = {"params": {"w": np.array(0.2)}, "hparams": {"x": np.array(0.3)}, "train": [None] * 3}
    assert estimate(backend, estimator, square, **given).hypergradient["x"] != 0.0


def test_row_16_a_loss_that_is_no_number_and_shapes_that_differ(backend):
    vector = hg.Bilevel(lambda p, h, b: p["w"] * h["x"], fit)
    says(refused(errors.ArgumentError, ValueError, estimate, backend, GREEDY, vector), "(2,)", "()")
    wrong = (lambda p: (), lambda g, s, p, h: ({"w": (p["w"] - g["w"])[:1]}, s))
    error = refused(errors.ArgumentError, ValueError, estimate, backend, hg.Greedy(wrong))
    says(error, "params['w']", "(1,)", "(2,)")


def test_row_17_dtypes_of_leaves_may_differ_and_operations_may_not_mix_them(backend):
    error = refused(
        errors.LeafTypeError, TypeError, estimate, backend, GREEDY, **SINGLE | {"hparams": strengths()}
    )
    says(error, "hparams['x']", "float32", "float64")
    narrow = lambda p, h, b: ridge(p, {"x": backend.cast(h["x"], "float32")}, b)  # noqa: E731
    given = SINGLE | {"hparams": strengths()}
    out = estimate(backend, GREEDY, hg.Bilevel(narrow, fit), **given)
    assert out.hypergradient["x"].dtype == np.float64 and out.state.params["w"].dtype == np.float32
    other = np.ones(2) if backend.name != "numpy" else (jax.numpy.ones(2) if jax else torch.ones(2))
    with pytest.raises(errors.LeafTypeError, match=r"params\['w'\].* hparams\['y'\]|hparams\['y'\].* params"):
        params, hparams, train, val = converted(backend, (weights(), strengths(), batches(), batches()[0]))
        hg.hypergradient(RIDGE, params, hparams | {"y": other}, train, val, GREEDY)


@on_torch
def test_row_17_two_devices(backend):
    params, hparams = {"w": torch.ones(2)}, {"x": torch.ones(2, device="meta")}
    with pytest.raises(errors.LeafTypeError, match=r"hparams\['x'\] has device meta and params\['w'\]"):
        hg.hypergradient(RIDGE, params, hparams, [None], None, GREEDY)


def test_row_18_complex_parameters(backend):
    given = {"params": {"w": np.ones(2, complex)}}
    refused(errors.UnsupportedLeafError, NotImplementedError, estimate, backend, GREEDY, **given)


def test_row_19_an_operation_without_a_second_derivative(backend):
    tanh = {"numpy": once_in_numpy, "torch": once_in_torch, "jax": once_in_jax}[backend.name]()
    once, twice = (
        hg.Bilevel(lambda p, h, b, f=f: f(p["w"] * h["x"]).sum() + (p["w"] ** 2).sum(), fit)
        for f in (tanh, backend.xp.tanh)
    )
    error = refused(errors.UnsupportedOpError, NotImplementedError, estimate, backend, GREEDY, once)
    says(error, "derivative", "hg.FiniteDifference()")
    found = estimate(backend, hg.Greedy(SGD, products=hg.FiniteDifference()), once)
    expected = estimate(backend, GREEDY, twice)
    assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-6)


def once_in_numpy():
    from autograd.extend import defvjp, primitive

    @primitive
    def slope(g, x):
        return g * (1.0 - np.tanh(x) ** 2)

    @primitive
    def tanh(x):
        return np.tanh(x)

    defvjp(tanh, lambda ans, x: lambda g: slope(g, x))
    return tanh


def once_in_torch():
    from support.once_differentiable import OnceTanh

    return OnceTanh.apply


def once_in_jax():
    def slope(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: 1.0 - np.tanh(np.asarray(x)) ** 2, shape, x)

    @jax.custom_vjp
    def tanh(x):
        return jax.numpy.tanh(x)

    tanh.defvjp(lambda x: (tanh(x), x), lambda x, g: (g * slope(x),))
    return tanh


@on_torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
def test_row_20_a_compiled_or_wrapped_module(backend):
    from hypergrad_torch import ModuleTuner

    model, lam = torch.compile(torch.nn.Linear(2, 1)), {"x": torch.zeros(2, requires_grad=True)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(errors.UnsupportedOpError, match="compile"):
        ModuleTuner(model, optimizer, lam, inner=fit, outer=fit)


@with_a_generator
def test_row_21_noise_inside_a_loss(backend):
    def noisy(params, hparams, batch):
        noise = batch["noise"] if "noise" in batch else normal(backend, 5, 2)
        return fit(params, hparams, batch | {"x": batch["x"] + hparams["x"] * noise})

    backend.random.restore(backend.random.state(seed=3))
    held = [batch | {"noise": normal(backend, 5, 2)} for batch in batches()]
    expected = estimate(backend, UNROLLED, hg.Bilevel(noisy, fit), train=held).hypergradient["x"]
    backend.random.restore(backend.random.state(seed=3))
    found = estimate(backend, UNROLLED, hg.Bilevel(noisy, fit)).hypergradient["x"]
    assert_array_equal(found, expected)


@parametrize("where, data", [("T1", "train"), ("T2", "val")])
def test_row_22_batches_that_run_out(backend, where, data):
    error = refused(errors.ArgumentError, ValueError, estimate, backend, UNROLLED, **{data: iter([])})
    says(error, where)


@parametrize("dtype", ["f4", "f8"])
@parametrize(
    "space, start",
    [
        (hg.Positive(), 0.5),
        (hg.Positive("softplus"), 0.5),
        (hg.NonNegative(), 0.5),
        (hg.Interval(0.0, 1.0), 0.5),
        (hg.Interval(-0.3, 0.1), 0.0),
        (hg.Interval(1.0, 1.0 + 1e-3), 1.0005),
    ],
    ids=repr,
)
@parametrize("sign", [1.0, -1.0])
def test_row_23_a_hyperparameter_that_would_leave_its_domain(backend, space, start, dtype, sign):
    problem = hg.Bilevel(
        lambda p, h, b: ((p - 0.0 * h) ** 2).sum(), lambda p, h, b: (p**2).sum() + sign * h.sum()
    )
    tuner = hg.Tuner(problem, hg.Greedy(SGD, allow_unused=True), space, hg.SGD(1e6), every=1)
    params, hparams = converted(backend, (np.ones(2, dtype), np.full(2, start, dtype)))
    with np.errstate(over="ignore"):  # where λ has no upper end
        done = tuner.run(params, hparams, lambda t: None, lambda t: None, 5, progress=False)
    assert np.all(backend.to_numpy(space.contains(backend.xp, done.hparams)))
    has_an_end = sign > 0 or isinstance(space, hg.Interval)
    assert not has_an_end or np.any(done.history.clipped > 0)


def test_row_24_out_of_memory_in_the_middle(backend):
    left = [1]

    def inner(p, h, b):
        if left and left.pop():
            raise MemoryError("a stand-in for the framework's own error")
        return ridge(p, h, b)

    before = surroundings()
    with pytest.raises(MemoryError):
        estimate(backend, hg.Greedy(SGD), hg.Bilevel(inner, fit))
    assert surroundings() == before
    again = estimate(backend, hg.Greedy(SGD), hg.Bilevel(inner, fit)).hypergradient["x"]
    assert_array_equal(again, estimate(backend, hg.Greedy(SGD)).hypergradient["x"])


class TestRows25To27:
    @pytest.fixture
    def saved(self, backend, tmp_path):
        tuner = hg.Tuner(RIDGE, GREEDY, every=1)
        given = converted(backend, (weights(), strengths(), batches(), batches()))
        tuner.save(tmp_path / "run.npz", tuner.run(*given, 2, progress=False))
        return tmp_path / "run.npz", given[:2]

    def test_row_25_a_write_that_ends_in_the_middle(self, backend, saved, monkeypatch):
        path, given = saved
        whole = path.read_bytes()

        def fail(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space"):
            hg.Tuner(RIDGE, GREEDY, every=1).save(path, hg.Tuner(RIDGE, GREEDY, every=1).load(path, *given))
        assert path.read_bytes() == whole and [file.name for file in path.parent.iterdir()] == ["run.npz"]

    def test_row_26_a_damaged_file(self, backend, saved):
        path, given = saved
        whole = path.read_bytes()
        for damaged in (whole[:-9], whole[:500] + b"\1\2" + whole[502:], b"", b"PK"):
            path.write_bytes(damaged)
            with pytest.raises(errors.CheckpointError, match="damaged"):
                hg.Tuner(RIDGE, GREEDY, every=1).load(path, *given)

    def test_row_27_another_recipe_backend_or_structure(self, backend, saved):
        path, (params, hparams) = saved
        with pytest.raises(errors.CheckpointError) as caught:
            hg.Tuner(RIDGE, hg.Greedy(hg.SGD(0.1)), hg.Positive(), every=2).load(
                path, params | {"b": params["w"]}, hparams | {"x": hparams["x"] ** 2}
            )
        for line in ("recipe.estimator.update.lr", "recipe.space.type", "recipe.every", "params['b']"):
            assert line in str(caught.value)


def test_row_28_two_threads_at_once(backend):
    results = {}

    def work(k):
        for _ in range(5):
            results[k] = estimate(backend, hg.Greedy(hg.SGD(0.01 * (1 + k)))).hypergradient["x"]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, found in results.items():
        assert_array_equal(found, estimate(backend, hg.Greedy(hg.SGD(0.01 * (1 + k)))).hypergradient["x"])


class TestRow29:
    """A module knows that it holds one parameter in two places. In a tree two leaves are two parameters."""

    def test_row_29_one_array_in_two_leaves_is_two_parameters(self, backend):
        inner = lambda p, h, b: ridge({"w": p["w"] + p["v"]}, h, b)  # noqa: E731
        problem = hg.Bilevel(inner, lambda p, h, b: fit({"w": p["w"] + p["v"]}, h, b))
        w = weights()["w"]
        shared, apart = ({"w": w, "v": v} for v in (w, w.copy()))
        found = [estimate(backend, UNROLLED, problem, params=params) for params in (shared, apart)]
        assert_array_equal(*(out.hypergradient["x"] for out in found))

    @on_torch
    def test_row_29_a_shared_parameter_of_a_module_counts_once(self, backend):
        from hypergrad_torch import ModuleTuner

        def made(shared):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
            model = model.double()
            if shared:
                model[2].weight = model[0].weight
            lam = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
            loss = lambda m, h, b: (m(b) ** 2).mean() + h.exp() * m[0].weight.square().sum()  # noqa: E731
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            outer = lambda m, h, b: (m(b) - 1.0).square().mean()  # noqa: E731
            return model, ModuleTuner(model, optimizer, lam, inner=loss, outer=outer, every=1)

        batch = torch.ones(2, 3, dtype=torch.float64)
        model, tuner = made(True)
        found = float(tuner.step(batch, batch).estimate.hypergradient)
        w = dict(made(True)[0].named_parameters())  # counted once: three names for four tensors
        assert len(w) == 3

        def after(lam):
            leaves = {name: p.detach().clone().requires_grad_() for name, p in w.items()}
            a, c, d = leaves["0.weight"], leaves["0.bias"], leaves["2.bias"]
            predict = lambda a, c, d: torch.tanh(batch @ a.T + c) @ a.T + d  # noqa: E731
            loss = (predict(a, c, d) ** 2).mean() + np.exp(lam) * (a**2).sum()
            moved = [
                p - 0.1 * g for p, g in zip((a, c, d), torch.autograd.grad(loss, (a, c, d)), strict=True)
            ]
            return float((predict(*moved) - 1.0).square().mean().detach())

        assert_allclose(found, (after(-1.0 + 1e-5) - after(-1.0 - 1e-5)) / 2e-5, rtol=1e-8)


@with_a_generator
def test_row_30_a_batch_function_that_is_not_deterministic(backend):
    rng, data = np.random.default_rng(0), batches()[0]
    train = lambda t: converted(backend, data | {"y": rng.normal(size=5)})  # noqa: E731
    tape = hg.Binomial(2, verify=True)
    with pytest.raises(errors.ReplayError) as caught:
        estimate(backend, hg.Unrolled(SGD, 4, tape=tape), train=train)
    assert caught.value.step is not None


def test_row_31_an_update_rule_that_cuts_the_gradient_off(backend):
    cuts = {
        "numpy": backend.to_numpy,
        "torch": lambda x: x.detach(),
        "jax": lambda x: jax.lax.stop_gradient(x),
    }
    cut = cuts[backend.name]
    rule = (lambda p: (), lambda g, s, p, h: ({"w": p["w"] - 0.1 * cut(g["w"])}, s))
    says(refused(errors.DisconnectedError, ValueError, estimate, backend, hg.Greedy(rule)), "update")


def test_row_32_a_value_that_uses_a_hyperparameter_and_a_gradient_that_does_not(backend):
    inner = lambda p, h, b: fit(p, h, b) + (backend.xp.sign(p["w"] * h["x"])).sum()  # noqa: E731
    with pytest.warns(errors.ZeroResponseWarning, match=r"hparams\['x'\]"):
        out = estimate(backend, GREEDY, hg.Bilevel(inner, fit))
    assert_array_equal(out.hypergradient["x"], np.zeros(2))


@on_torch
def test_row_33_a_rate_that_is_a_hyperparameter_in_torch(backend):
    from hypergrad_torch import ModuleTuner

    model, rate = torch.nn.Linear(2, 1), torch.tensor(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with pytest.raises(errors.ArgumentError, match="TorchOptimizer"):
        ModuleTuner(model, optimizer, {"lr": rate.requires_grad_()}, inner=fit, outer=fit)


@on_jax
def test_row_33_a_rate_that_is_a_hyperparameter_in_jax(backend):
    optax = pytest.importorskip("optax")
    given = converted(backend, (weights(), strengths() | {"lr": np.array(0.1)}, batches(), batches()[0]))
    with pytest.raises(errors.HypergradError, match=r"hparams\['lr'\]"):
        hg.hypergradient(RIDGE, *given, hg.Greedy(optax.sgd(given[1]["lr"])))


@on_torch
def test_row_34_a_parameter_that_requires_no_gradient(backend):
    fixed = torch.nn.Parameter(torch.full((2,), 0.5, dtype=torch.float64), requires_grad=False)
    inner = lambda p, h, b: ridge({"w": p["w"] + p["v"]}, h, b)  # noqa: E731
    out = estimate(backend, UNROLLED, hg.Bilevel(inner, fit), params=weights() | {"v": fixed})
    assert_array_equal(out.state.params["v"], fixed.numpy())


@on_torch
def test_row_35_checkpointing_inside_a_loss(backend):
    from torch.utils.checkpoint import checkpoint

    def inner(p, h, b):
        return checkpoint(lambda w, x: ridge({"w": w}, {"x": x}, b), p["w"], h["x"], use_reentrant=False)

    for estimator in (hg.Greedy(SGD), UNROLLED, IMPLICIT):
        found, expected = (estimate(backend, estimator, hg.Bilevel(loss, fit)) for loss in (inner, ridge))
        assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-12)


@on_torch
def test_row_36_a_backward_that_is_not_the_derivative(backend):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 1.0 * x

        @staticmethod
        def backward(ctx, g):
            return 0.5 * g

    problem = hg.Bilevel(lambda p, h, b: ridge({"w": Halved.apply(p["w"])}, h, b), fit)
    error = refused(
        errors.UnsupportedOpError, NotImplementedError, estimate, backend, hg.Greedy(SGD), problem
    )
    says(error, "Halved")


def test_row_37_draws_outside_of_what_is_replayed(backend):
    rng = np.random.default_rng(0)
    inner = lambda p, h, b: ridge(p, h, b) + float(rng.normal()) * p["w"].sum()  # noqa: E731
    tape = hg.Binomial(2)
    if backend.compiles:
        pytest.skip("a compiled loss is called once: what it draws in Python is a constant")
    with pytest.raises(errors.ReplayError):
        estimate(backend, hg.Unrolled(SGD, 4, tape=tape), hg.Bilevel(inner, fit), train=batches(4))


@on_jax
def test_row_38_a_failed_solve_that_nobody_can_read(backend):
    given = quadratic(backend, (2.0, 0.0))
    params, hparams = converted(backend, (given["params"], given["hparams"]))
    f = jax.jit(lambda h: hg.hypergradient(given["problem"], params, h, [None], [None], hg.Implicit(hg.CG())))
    assert np.isnan(backend.to_numpy(f(hparams)["x"])).all()


@on_jax
def test_row_39_a_fault_in_a_tuner_that_nobody_can_read(backend):
    tuner = hg.Tuner(RIDGE, GREEDY, every=1)
    params, hparams, val = converted(backend, (weights(), strengths(), batches()[0]))
    state = tuner.init(params, hparams)
    bad = converted(backend, batches()[0] | {"y": np.full(5, np.nan)})
    new, step = jax.jit(lambda s: tuner.step(s, bad, val))(state)
    assert_array_equal(tuner.hparams(new)["x"], strengths()["x"])
    with pytest.raises(errors.NonFiniteError):
        tuner.check(new, step)


def test_row_40_an_interrupt(backend):
    """At every line: tests/tuning/test_interrupts.py. Here, that a tuner holds it back."""
    import signal

    held = []

    def inner(p, h, b):
        if not held:
            held.append(signal.getsignal(signal.SIGINT))
            signal.raise_signal(signal.SIGINT)
        return ridge(p, h, b)

    given = converted(backend, (weights(), strengths(), batches(), batches()))
    with pytest.raises(KeyboardInterrupt) as stop:
        hg.Tuner(hg.Bilevel(inner, fit), GREEDY, every=1).run(*given, 6, progress=False)
    assert isinstance(getattr(held[0], "__self__", None), Interrupts)
    done = stop.value.run
    assert len(done.history.inner_values) == len(done.history.steps) - 1 > 0


@parametrize("data", ["train", "val"])
def test_row_41_a_list_of_arrays_as_one_batch(backend, data):
    pair = [np.ones((5, 2)), np.ones(5)]
    error = refused(errors.ArgumentError, ValueError, estimate, backend, GREEDY, **{data: pair})
    says(error, "tuple(batch)", "lambda t: batches[t]")


@parametrize("size", [1e-25, 1e-12, 1.0, 1e12, 1e18])
def test_row_42_values_near_the_ends_of_float32(backend, size):
    """C2 scaled by a number scales the hypergradient by it."""
    scaled = hg.Bilevel(ridge, lambda p, h, b: size * fit(p, h, b))
    exact = estimate(backend, hg.Implicit(hg.CG(1000, 1e-5), checks=IMPLICIT.checks), **SINGLE)
    found = estimate(backend, hg.Implicit(hg.CG(1000, 1e-5), checks=IMPLICIT.checks), scaled, **SINGLE)
    ratio = found.hypergradient["x"].astype(float) / exact.hypergradient["x"].astype(float)
    assert_allclose(ratio, size, rtol=1e-4)
