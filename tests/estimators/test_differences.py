"""The mixed term by finite differences of gradients, against the exact one."""

from functools import partial

import numpy as np
import pytest
from support.mixed import (
    FORGIVING,
    GREEDY,
    IMPLICIT,
    Task,
    both_sides,
    distance,
    drawn,
    every_greedy,
    every_implicit,
    flat,
    net,
    on_both,
)

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


@on_both
@both_sides
class TestAgreement:
    """With the exact mixed term, on smooth losses in float64."""

    @every_greedy
    def test_greedy(self, backend, make, constants, mixed, tolerance):
        task = net(backend, **constants)
        state = task.warm(make())
        exact, out = (task.estimate(make(products=how), state) for how in (hg.Exact(), mixed))
        for name in task.hparams:
            assert distance(out.hypergradient[name], exact.hypergradient[name]) <= tolerance
        assert distance(out.state.params, exact.state.params) <= 1e-14
        assert float(out.inner_value) == pytest.approx(float(exact.inner_value), rel=1e-14)
        assert float(out.outer_value) == pytest.approx(float(exact.outer_value), rel=1e-14)
        assert out.report.reached == exact.report.reached

    @every_implicit
    def test_implicit(self, backend, make, mixed, tolerance):
        task = net(backend)
        exact, out = (task.estimate(make(products=how)) for how in (hg.Exact(), mixed))
        for name in task.hparams:
            assert distance(out.hypergradient[name], exact.hypergradient[name]) <= tolerance
        assert float(out.report.solve.residual) == pytest.approx(
            float(exact.report.solve.residual), abs=tolerance
        )

    @every_implicit
    def test_implicit_over_several_batches(self, backend, make, mixed, tolerance):
        task = net(backend)
        task = task._replace(train=[task.train, task.val, net(backend, seed=1).train])
        exact, out = (task.estimate(make(products=how)) for how in (hg.Exact(), mixed))
        assert distance(out.hypergradient, exact.hypergradient) <= tolerance

    def test_greedy_with_noise_that_the_loss_draws(self, backend, mixed, tolerance):
        self.draws_alike(backend, partial(hg.Greedy, hg.SGD(0.1)), mixed, tolerance)

    @parametrize("solver", ["cg", "identity"])
    def test_implicit_with_noise_that_the_loss_draws(self, backend, solver, mixed, tolerance):
        self.draws_alike(backend, IMPLICIT[solver], mixed, tolerance)

    def draws_alike(self, backend, make, mixed, tolerance):
        """The same hypergradient, and the generator then stands where it does after the exact way."""
        task, ends = net(backend, noise=drawn), []
        for how in (hg.Exact(), mixed):
            with backend.random.replay(backend.random.state(1)):
                out = task.estimate(make(products=how))
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
        out = task.estimate(make(products=hg.FiniteDifference(sides)))
        assert task.calls == {"inner": 1 + 2 * sides, "outer": 1}
        assert (out.report.gradients, out.report.products) == (2 + 2 * sides, 0)
        assert out.report.cost == 2 + 2 * sides

    @parametrize("sides", [1, 2])
    @parametrize("batches", [1, 3])
    @every_implicit
    def test_what_implicit_spends(self, backend, make, batches, sides):
        task = net(backend)
        task = task._replace(train=[task.train] * batches)
        out = task.estimate(make(products=hg.FiniteDifference(sides)))
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
        out = task.estimate(make(products=hg.FiniteDifference(sides, radius, tolerance=FORGIVING)))
        true, seen = distance(out.hypergradient, exact.hypergradient), float(out.report.difference_error)
        assert true / 100 <= seen <= 100 * true or max(true, seen) <= 1e-8

    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["identity"]])
    def test_no_error_of_an_exact_product(self, backend, make):
        assert net(backend).estimate(make()).report.difference_error is None

    @parametrize("make", [GREEDY["sgd"][0], IMPLICIT["identity"]])
    def test_a_validation_loss_at_its_minimum(self, backend, make):
        task = net(backend)
        flat_there = lambda p, h, b: 0.0 * backend.xp.sum(p["w"])  # noqa: E731
        task = task._replace(problem=hg.Bilevel(task.problem.inner, flat_there))
        out = task.estimate(make(products=hg.FiniteDifference()))
        assert float(out.report.difference_error) == 0.0 and not flat(out.hypergradient).any()

    def test_an_error_above_the_tolerance(self, backend):
        task, rough = net(backend), partial(hg.FiniteDifference, radius=0.3)
        out = task.estimate(hg.Greedy(hg.SGD(0.1), products=rough(tolerance=FORGIVING)))
        error = float(out.report.difference_error)
        assert error > 1e-3
        task.estimate(hg.Greedy(hg.SGD(0.1), products=rough(tolerance=1.001 * error)))
        for make in (GREEDY["sgd"][0], IMPLICIT["identity"]):
            with pytest.raises(errors.DifferenceError) as caught:
                task.estimate(make(products=rough(tolerance=1e-6)))
            assert caught.value.tolerance == 1e-6 < caught.value.error


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
            task.estimate(hg.Greedy(hg.SGD(0.1), products=mixed))
        assert "kinks" in str(caught.value) and "tolerance" in str(caught.value)
        assert caught.value.error > caught.value.tolerance == mixed.tolerance
        accepting = hg.FiniteDifference(mixed.sides, tolerance=FORGIVING)
        out = task.estimate(hg.Greedy(hg.SGD(0.1), products=accepting))
        assert np.isfinite(flat(out.hypergradient)).all()
        assert float(out.report.difference_error) == pytest.approx(caught.value.error)

    @seeds
    @both_sides
    def test_penalties_do_not_see_them(self, backend, seed, mixed, tolerance):
        # Its mixed term is 2 θ, and greedy takes no other part of the second derivative.
        task = relu_net(backend, "penalty", seed, dtype=float)
        exact, out = (task.estimate(hg.Greedy(hg.SGD(0.1), products=how)) for how in (hg.Exact(), mixed))
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
        with pytest.raises(errors.ArgumentError, match="products"):
            make(products=mixed)
