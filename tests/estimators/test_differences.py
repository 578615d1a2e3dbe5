"""The mixed term by finite differences of gradients, against the exact one, and `probe`, which compares them.

Losses are written in the array functions that the frameworks share, or in torch's where they hold what has no
second derivative there.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.frameworks import each
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize
on_both = each("numpy", "torch")
FORGIVING = float("inf")


class Task(NamedTuple):
    """What an estimate takes; ``calls`` counts the evaluations of C̃1 and of C2."""

    problem: hg.Bilevel
    params: dict
    hparams: dict
    train: dict
    val: dict
    calls: dict

    def warm(self, estimator, steps=3):
        """The state after some training: Adam's first step hardly depends on the size of a gradient."""
        state = estimator.init(self.problem, self.params, self.hparams)
        for _ in range(steps * estimator.training_steps):
            state = estimator.estimate(self.problem, state, self.hparams, self.train, self.val).state
        return state

    def estimate(self, estimator, state=None):
        state = estimator.init(self.problem, self.params, self.hparams) if state is None else state
        self.calls.clear()
        return estimator.estimate(self.problem, state, self.hparams, self.train, self.val)


def given(b):
    """The noise that comes with the batch."""
    return b["noise"]


def drawn(b):
    """The noise that the framework draws from its own generator."""
    shape = tuple(b["noise"].shape)
    if isinstance(b["noise"], torch.Tensor):
        return torch.randn(shape, dtype=torch.float64)
    return np.random.normal(size=shape)


def net(backend, noise=given, seed=0, log_l2=(1.0, 1.5), **constants):
    """Regression by a small tanh net, trained with noise on its inputs and a penalty for each layer.

    Validation judges it with noise too, of its own. The penalties make the training loss convex at θ.
    """
    xp, rng, calls = backend.xp, np.random.default_rng(seed), {}

    def predict(params, x):
        return xp.tanh(x @ params["w"]) @ params["v"]

    def error(params, x, y):
        residual = predict(params, x) - y
        return xp.mean(residual * residual)

    def inner(params, hparams, b):
        calls["inner"] = calls.get("inner", 0) + 1
        strengths = xp.exp(hparams["log_l2"])
        penalty = strengths[0] * xp.sum(params["w"] ** 2) + strengths[1] * xp.sum(params["v"] ** 2)
        return error(params, b["x"] + hparams["noise"] * noise(b), b["y"]) + penalty

    def outer(params, hparams, b):
        calls["outer"] = calls.get("outer", 0) + 1
        return error(params, b["x"] + 0.5 * noise(b), b["y"])

    def normal(scale=1.0, **shapes):
        return {name: backend.asarray(scale * rng.normal(size=shape)) for name, shape in shapes.items()}

    params = normal(0.3, w=(3, 4), v=4)
    hparams = {"log_l2": log_l2, "noise": 0.4} | constants
    hparams = {name: backend.asarray(np.array(value)) for name, value in hparams.items()}
    train, val = (normal(x=(8, 3), noise=(8, 3), y=8) for _ in range(2))
    return Task(hg.Bilevel(inner, outer), params, hparams, train, val, calls)


def relu_net(backend, hyper, seed=0, dtype=np.float32):
    """Classification by two hidden layers of 256, with noise on the inputs or with a penalty."""
    xp, rng = backend.xp, np.random.default_rng(seed)

    def error(params, x, y):
        for w in params[:-1]:
            x = x @ w
            x = xp.where(x > 0, x, xp.zeros_like(x))
        logits = x @ params[-1]
        return xp.mean(xp.log(xp.sum(xp.exp(logits), axis=1)) - xp.sum(logits * y, axis=1))

    def inner(params, hparams, b):
        if hyper == "noise":
            return error(params, b["x"] + hparams * b["noise"], b["y"])
        return error(params, b["x"], b["y"]) + hparams * sum(xp.sum(w * w) for w in params)

    def array(x):
        return backend.asarray(np.asarray(x, dtype))

    def batch():
        labels = array(np.eye(10)[rng.integers(10, size=256)])
        return {
            "x": array(rng.normal(size=(256, 64))),
            "noise": array(rng.normal(size=(256, 64))),
            "y": labels,
        }

    sizes = (64, 256, 256, 10)
    params = [array(rng.normal(size=(m, n)) * (2 / m) ** 0.5) for m, n in zip(sizes, sizes[1:], strict=False)]
    outer = lambda params, hparams, b: error(params, b["x"], b["y"])  # noqa: E731
    return Task(hg.Bilevel(inner, outer), params, array(0.1), batch(), batch(), {})


def flat(tree):
    """All numbers of a tree of arrays, by the order of its paths."""
    if isinstance(tree, dict):
        return np.concatenate([flat(tree[name]) for name in sorted(tree)])
    return np.ravel(tree.detach().numpy() if isinstance(tree, torch.Tensor) else tree).astype(float)


def distance(mine, exact):
    mine, exact = flat(mine), flat(exact)
    assert np.linalg.norm(exact) > 0
    return float(np.linalg.norm(mine - exact) / np.linalg.norm(exact))


def learned_rate(h):
    return h["lr"]


GREEDY = {
    "sgd": (partial(hg.Greedy, hg.SGD(0.1)), {}),
    "momentum": (partial(hg.Greedy, hg.SGD(0.1, momentum=0.9, nesterov=True)), {}),
    "adam": (partial(hg.Greedy, hg.Adam(0.02)), {}),
    "sgd-learned-rate": (partial(hg.Greedy, hg.SGD(learned_rate)), {"lr": 0.1}),
    "adam-learned-rate": (partial(hg.Greedy, hg.Adam(learned_rate)), {"lr": 0.02}),
    "no-lookahead": (partial(hg.Greedy, hg.SGD(0.1), lookahead=False), {}),
    "gradient-of-sgd": (partial(hg.Greedy, hg.SGD(0.1), response="gradient"), {}),
    "gradient-of-adam": (partial(hg.Greedy, hg.Adam(0.02), response="gradient"), {}),
}
every_greedy = parametrize(("make", "constants"), GREEDY.values(), ids=GREEDY)

IMPLICIT = {
    "cg": partial(hg.Implicit, hg.CG(rtol=1e-6), tolerance=FORGIVING),
    "direct": partial(hg.Implicit, hg.Direct(), tolerance=FORGIVING),
    "neumann": partial(hg.Implicit, hg.Neumann(8, step_size=0.03), tolerance=FORGIVING),
    "neumann-power": partial(hg.Implicit, hg.Neumann(8), damping=1.0, tolerance=FORGIVING),
    "identity": partial(hg.Implicit, hg.Identity(0.1), tolerance=FORGIVING),
}
every_implicit = parametrize("make", IMPLICIT.values(), ids=IMPLICIT)

SIDES = {"two-sided": (hg.FiniteDifference(), 1e-7), "one-sided": (hg.FiniteDifference(sides=1), 1e-4)}
both_sides = parametrize(("mixed", "tolerance"), SIDES.values(), ids=SIDES)


@on_both
@both_sides
class TestAgreement:
    """With the exact mixed term, on smooth losses in float64."""

    @every_greedy
    def test_greedy(self, backend, make, constants, mixed, tolerance):
        task = net(backend, **constants)
        state = task.warm(make())
        exact, out = (task.estimate(make(mixed=how), state) for how in (None, mixed))
        for name in task.hparams:
            assert distance(out.hypergradient[name], exact.hypergradient[name]) <= tolerance
        assert distance(out.state.params, exact.state.params) <= 1e-14
        assert float(out.inner_value) == pytest.approx(float(exact.inner_value), rel=1e-14)
        assert float(out.outer_value) == pytest.approx(float(exact.outer_value), rel=1e-14)
        assert out.report.responds == exact.report.responds

    @every_implicit
    def test_implicit(self, backend, make, mixed, tolerance):
        task = net(backend)
        exact, out = (task.estimate(make(mixed=how)) for how in (None, mixed))
        for name in task.hparams:
            assert distance(out.hypergradient[name], exact.hypergradient[name]) <= tolerance
        assert float(out.report.residual) == pytest.approx(float(exact.report.residual), abs=tolerance)

    @every_implicit
    def test_implicit_over_several_batches(self, backend, make, mixed, tolerance):
        task = net(backend)
        task = task._replace(train=[task.train, task.val, net(backend, seed=1).train])
        exact, out = (task.estimate(make(mixed=how)) for how in (None, mixed))
        assert distance(out.hypergradient, exact.hypergradient) <= tolerance

    def test_greedy_with_noise_that_the_loss_draws(self, backend, mixed, tolerance):
        self.draws_alike(backend, partial(hg.Greedy, hg.SGD(0.1)), mixed, tolerance)

    @parametrize("solver", ["cg", "identity"])
    def test_implicit_with_noise_that_the_loss_draws(self, backend, solver, mixed, tolerance):
        self.draws_alike(backend, IMPLICIT[solver], mixed, tolerance)

    def draws_alike(self, backend, make, mixed, tolerance):
        """The same hypergradient, and the generator then stands where it does after the exact way."""
        task, ends = net(backend, noise=drawn), []
        for how in (None, mixed):
            with backend.replay(backend.generator(1)):
                out = task.estimate(make(mixed=how))
                ends.append((out, drawn(task.train)))
        (exact, after), (out, after_differences) = ends
        assert distance(out.hypergradient, exact.hypergradient) <= tolerance
        assert float(out.outer_value) == pytest.approx(float(exact.outer_value), rel=1e-14)
        np.testing.assert_array_equal(flat(after_differences), flat(after))


@on_both
class TestReport:
    @parametrize("sides", [1, 2])
    @every_greedy
    def test_what_greedy_spends(self, backend, make, constants, sides):
        task = net(backend, **constants)
        out = task.estimate(make(mixed=hg.FiniteDifference(sides)))
        assert task.calls == {"inner": 1 + 2 * sides, "outer": 1}
        assert (out.report.gradients, out.report.products) == (2 + 2 * sides, 0)
        assert out.report.cost == 2 + 2 * sides

    @parametrize("sides", [1, 2])
    @parametrize("batches", [1, 3])
    @every_implicit
    def test_what_implicit_spends(self, backend, make, batches, sides):
        task = net(backend)
        task = task._replace(train=[task.train] * batches)
        out = task.estimate(make(mixed=hg.FiniteDifference(sides)))
        spent = int(out.report.gradients)
        assert task.calls == {"inner": spent - 1, "outer": 1}
        assert spent > 1 and out.report.products == 0

    @parametrize("radius", [None, 1e-4, 1e-3, 1e-2])
    @parametrize("sides", [1, 2])
    @parametrize("make", [GREEDY["sgd"][0], GREEDY["gradient-of-sgd"][0], IMPLICIT["identity"]])
    def test_the_estimate_of_the_error(self, backend, make, sides, radius):
        # C2 uses no λ and the rate is a number: the hypergradient is the product itself, up to a factor.
        task = net(backend)
        exact = task.estimate(make())
        out = task.estimate(make(mixed=hg.FiniteDifference(sides, radius, tolerance=FORGIVING)))
        true, seen = distance(out.hypergradient, exact.hypergradient), float(out.report.difference_error)
        assert true / 100 <= seen <= 100 * true or max(true, seen) <= 1e-8

    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["identity"]])
    def test_no_error_of_an_exact_product(self, backend, make):
        assert np.isnan(float(net(backend).estimate(make()).report.difference_error))

    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["identity"]])
    def test_a_validation_loss_at_its_minimum(self, backend, make):
        task = net(backend)
        flat_there = lambda p, h, b: 0.0 * backend.xp.sum(p["w"])  # noqa: E731
        task = task._replace(problem=hg.Bilevel(task.problem.inner, flat_there))
        out = task.estimate(make(mixed=hg.FiniteDifference()))
        assert float(out.report.difference_error) == 0.0 and not flat(out.hypergradient).any()

    def test_an_error_above_the_tolerance(self, backend):
        task, rough = net(backend), partial(hg.FiniteDifference, radius=0.3)
        out = task.estimate(hg.Greedy(hg.SGD(0.1), mixed=rough(tolerance=FORGIVING)))
        error = float(out.report.difference_error)
        assert error > 1e-3
        task.estimate(hg.Greedy(hg.SGD(0.1), mixed=rough(tolerance=1.001 * error)))
        for make in (GREEDY["sgd"][0], IMPLICIT["identity"]):
            with pytest.raises(errors.DifferenceError) as caught:
                task.estimate(make(mixed=rough(tolerance=1e-6)))
            assert caught.value.tolerance == 1e-6 < caught.value.error


@on_both
class TestKinks:
    """ReLU: its gradient jumps, and so does what noise on the inputs does to the gradient."""

    # Two radii may agree by chance, about once in twenty; at these seeds they are far from it.
    seeds = parametrize("seed", [0, 1, 3, 4, 5])

    @seeds
    @both_sides
    def test_a_noise_scale_in_single_precision(self, backend, seed, mixed, tolerance):
        task = relu_net(backend, "noise", seed)
        with pytest.raises(errors.DifferenceError) as caught:
            task.estimate(hg.Greedy(hg.SGD(0.1), mixed=mixed))
        assert "kinks" in str(caught.value) and "tolerance" in str(caught.value)
        assert caught.value.error > caught.value.tolerance == mixed.tolerance
        accepting = hg.FiniteDifference(mixed.sides, tolerance=FORGIVING)
        out = task.estimate(hg.Greedy(hg.SGD(0.1), mixed=accepting))
        assert np.isfinite(flat(out.hypergradient)).all()
        assert float(out.report.difference_error) == pytest.approx(caught.value.error)

    @seeds
    @both_sides
    def test_penalties_do_not_see_them(self, backend, seed, mixed, tolerance):
        # Its mixed term is 2 θ, and greedy takes no other part of the second derivative.
        task = relu_net(backend, "penalty", seed, dtype=float)
        exact, out = (task.estimate(hg.Greedy(hg.SGD(0.1), mixed=how)) for how in (None, mixed))
        assert distance(out.hypergradient, exact.hypergradient) <= tolerance


class TestArguments:
    @parametrize("sides", [0, 3, -1, 1.5, "2", None], ids=repr)
    def test_sides(self, sides):
        with pytest.raises(errors.ArgumentError, match="sides"):
            hg.FiniteDifference(sides)

    @parametrize("value", [0, 0.0, -1e-3, float("nan")], ids=repr)
    @parametrize("name", ["radius", "tolerance"])
    def test_numbers_that_are_not_positive(self, name, value):
        with pytest.raises(errors.ArgumentError, match=name):
            hg.FiniteDifference(**{name: value})

    @parametrize("value", ["1e-3"], ids=repr)
    @parametrize("name", ["radius", "tolerance"])
    def test_no_numbers(self, name, value):
        with pytest.raises(errors.ArgumentError, match=name):
            hg.FiniteDifference(**{name: value})

    @parametrize("mixed", ["differences", True, 1e-3, hg.FiniteDifference], ids=repr)
    @parametrize("make", [partial(hg.Greedy, hg.SGD(0.1)), hg.Implicit], ids=["Greedy", "Implicit"])
    def test_what_is_no_difference(self, make, mixed):
        with pytest.raises(errors.ArgumentError, match="FiniteDifference"):
            make(mixed=mixed)


class OnceTanh(torch.autograd.Function):
    """tanh, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def attention(kernel, params, x):
    q, k, v = ((x @ w).unsqueeze(0).unsqueeze(0) for w in params["w"])
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(q, k, v)[0, 0] @ params["v"]


def by_tanh(tanh, params, x):
    return tanh(tanh(x @ params["w"][0]) @ params["w"][1]) @ params["v"]


LAYERS = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh())


def by_module(module, params, x):
    weights = {"0.weight": params["w"][0].T, "2.weight": params["w"][1].T}
    prefix = "_orig_mod." if hasattr(module, "_orig_mod") else ""
    named = {prefix + name: weight for name, weight in weights.items()}
    return torch.func.functional_call(module, named, x) @ params["v"]


def compiled(module):
    return torch.compile(module, backend="aot_eager")


# What has no second derivative, and the same function with one.
FUNCTIONS = {
    "flash-attention": lambda: (
        partial(attention, SDPBackend.FLASH_ATTENTION),
        partial(attention, SDPBackend.MATH),
    ),
    "once-differentiable": lambda: (partial(by_tanh, OnceTanh.apply), partial(by_tanh, torch.tanh)),
    "compiled-module": lambda: (partial(by_module, compiled(LAYERS)), partial(by_module, LAYERS)),
    "compiled-function": lambda: (partial(by_tanh, compiled(torch.tanh)), partial(by_tanh, torch.tanh)),
    "compiled-net": lambda: (compiled(partial(by_tanh, torch.tanh)), partial(by_tanh, torch.tanh)),
}
REMEDIES = {"flash": "SDPBackend.MATH", "once": "once_differentiable", "compiled": "compile"}


def torch_task(predict, seed=0):
    """Regression by a function of torch on T1; T2 is the same in either case."""
    gen = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=gen, dtype=torch.float64)

    def error(params, x, y):
        return (predict(params, x) - y).square().mean()

    def inner(params, hparams, b):
        penalty = hparams["log_l2"].exp() * (params["w"].square().sum() + params["v"].square().sum())
        return error(params, b["x"] + hparams["noise"] * b["noise"], b["y"]) + penalty

    params = {"w": draw(3, 4, 4) / 4, "v": draw(4) / 2}
    hparams = {name: torch.tensor(h, dtype=torch.float64) for name, h in (("log_l2", 1.0), ("noise", 0.4))}
    train, val = ({"x": draw(6, 4), "noise": draw(6, 4), "y": draw(6)} for _ in range(2))
    outer = lambda params, hparams, b: error(params, b["x"], b["y"])  # noqa: E731
    return Task(hg.Bilevel(inner, outer), params, hparams, train, val, {})


@parametrize("function", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
class TestWithoutASecondDerivative:
    WAYS = {
        "greedy": GREEDY["momentum"][0],
        "gradient": GREEDY["gradient-of-sgd"][0],
        "identity": IMPLICIT["identity"],
        "cg": IMPLICIT["cg"],
    }

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @parametrize("way", WAYS)
    def test_exactly_is_refused(self, function, way):
        with pytest.raises(errors.UnsupportedOpError) as caught:
            torch_task(FUNCTIONS[function]()[0]).estimate(self.WAYS[way]())
        assert "FiniteDifference" in str(caught.value)
        assert REMEDIES[function.split("-")[0]] in str(caught.value)

    @parametrize("way", WAYS)
    def test_differences_agree_with_the_exact_way_of_the_same_function(self, function, way):
        without, smooth = FUNCTIONS[function]()
        make = self.WAYS[way]
        out = torch_task(without).estimate(make(mixed=hg.FiniteDifference()))
        exact = torch_task(smooth).estimate(make())
        for name in ("log_l2", "noise"):
            assert distance(out.hypergradient[name], exact.hypergradient[name]) <= 1e-6


class TestProbe:
    WAYS = (None, hg.FiniteDifference(), hg.FiniteDifference(sides=1))

    def probe(self, task, estimator, **options):
        options = {"repeats": 2} | options
        return hg.probe(task.problem, task.params, task.hparams, task.train, task.val, estimator, **options)

    @on_both
    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["cg"]], ids=["Greedy", "Implicit"])
    def test_a_row_for_each_way(self, backend, make):
        seen = self.probe(net(backend), make())
        assert tuple(way.mixed for way in seen.ways) == self.WAYS
        assert not any(way.failure for way in seen.ways) and all(way.seconds > 0 for way in seen.ways)
        exact, two, one = (way.error for way in seen.ways)
        assert exact == 0.0 < two <= 1e-7 and 0.0 < one <= 1e-4
        title, *rows = str(seen).splitlines()
        assert type(make()).__name__ in title and len(rows) == 3
        for row, name in zip(rows, ("exact", repr(self.WAYS[1]), repr(self.WAYS[2])), strict=True):
            assert row.strip().startswith(name) and " ms " in row

    @on_both
    def test_the_best_is_the_fastest(self, backend):
        seen = self.probe(net(backend), hg.Greedy(hg.SGD(0.1)))
        assert seen.best == min(seen.ways, key=lambda way: way.seconds).mixed

    @on_both
    def test_ways_of_ones_own(self, backend):
        ways = tuple(hg.FiniteDifference(radius=radius) for radius in (1e-6, 1e-4))
        seen = self.probe(net(backend), hg.Greedy(hg.SGD(0.1)), ways=ways)
        assert tuple(way.mixed for way in seen.ways) == ways
        # Without an exact way it is the difference's own estimate.
        assert all(0 < way.error <= 1e-5 for way in seen.ways)

    @on_both
    def test_random_losses_are_compared_on_the_same_draws(self, backend):
        with backend.replay(backend.generator(3)):
            task = net(backend, noise=drawn)
            found = drawn(task.train)
        with backend.replay(backend.generator(3)):
            seen = self.probe(net(backend, noise=drawn), hg.Greedy(hg.SGD(0.1)))
            np.testing.assert_array_equal(flat(drawn(task.train)), flat(found))
        assert all(way.error <= 1e-4 for way in seen.ways)

    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["cg"]], ids=["Greedy", "Implicit"])
    def test_a_way_that_fails_says_why(self, make):
        task = torch_task(FUNCTIONS["once-differentiable"]()[0])
        seen = self.probe(task, make())
        exact, *differences = seen.ways
        assert "OnceTanh" in exact.failure and np.isnan([exact.seconds, exact.error]).all()
        assert not any(way.failure for way in differences) and seen.best in self.WAYS[1:]
        assert "OnceTanh" in str(seen).splitlines()[1] and " ms " not in str(seen).splitlines()[1]
        out = task.estimate(make(mixed=seen.best))
        assert np.isfinite(flat(out.hypergradient)).all()

    def test_no_way_that_works(self):
        task = torch_task(FUNCTIONS["once-differentiable"]()[0])
        seen = self.probe(task, hg.Greedy(hg.SGD(0.1)), ways=(None,))
        with pytest.raises(errors.ArgumentError):
            _ = seen.best

    @on_both
    def test_a_difference_that_is_refused(self, backend):
        ways = (None, hg.FiniteDifference(radius=0.3, tolerance=1e-6))
        seen = self.probe(net(backend), hg.Greedy(hg.SGD(0.1)), ways=ways)
        assert "finite differences" in seen.ways[1].failure and seen.best is None

    def test_an_estimator_without_a_mixed_term(self):
        task = torch_task(partial(by_tanh, torch.tanh))
        with pytest.raises(errors.ArgumentError, match="Unrolled"):
            self.probe(task, hg.Unrolled(hg.SGD(0.1), 2))
