"""Update rules that cut the gradient off, or are no update rules."""

from pathlib import Path

import numpy as np
import pytest
from autograd.tracer import getval
from support.faults import RIDGE, batches, converted, estimate, refused, says, strengths, weights
from support.frameworks import BACKENDS
from support.installed import jax, torch

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


def step(gradient, params):
    return {"w": params["w"] - 0.05 * gradient["w"]}


def numpy_values(gradient, params):
    return step({"w": getval(gradient["w"])}, params)


def detached(gradient, params):
    return step({"w": gradient["w"].detach()}, params)


def data(gradient, params):
    return step({"w": gradient["w"].data}, params)


def in_no_grad(gradient, params):
    with torch.no_grad():
        return step(gradient, params)


def in_place(gradient, params):
    with torch.no_grad():
        params["w"].sub_(0.05 * gradient["w"])
    return params


def another_library(gradient, params):
    theta = torch.nn.Parameter(params["w"].detach().clone())
    theta.grad = gradient["w"].detach()
    torch.optim.SGD([theta], 0.05).step()
    return {"w": theta.detach()}


def stop_gradient(gradient, params):
    return step(jax.lax.stop_gradient(gradient), params)


CUTS = [("numpy", numpy_values), ("jax", stop_gradient)]
CUTS += [("torch", cut) for cut in (detached, data, in_no_grad, in_place, another_library)]
CUTS = {f"{name}-{cut.__name__}": (BACKENDS[name], cut) for name, cut in CUTS if name in BACKENDS}


def pair(cut):
    return (lambda params: ()), lambda gradient, opt_state, params, hparams: (
        cut(gradient, params),
        opt_state,
    )


MAKE = [
    hg.Greedy,
    *(lambda u, t=t: hg.Unrolled(u, 3, tape=t) for t in (hg.Full(), hg.States(), hg.Binomial(2))),
]
MAKE += [lambda u: hg.Forward(u, 3), lambda u: hg.Greedy(hg.ClipNorm(u, 1.0))]
MAKE += [lambda u: hg.Greedy(hg.Proximal(u, lambda p, h: p))]
MAKE = dict(
    zip(["greedy", "full", "states", "binomial", "forward", "clipped", "proximal"], MAKE, strict=True)
)


@parametrize("backend, cut", CUTS.values(), ids=CUTS)
class TestRuleWithoutGradient:
    @parametrize("make", MAKE.values(), ids=MAKE)
    def test_is_refused_wherever_it_is_differentiated(self, backend, cut, make):
        error = refused(errors.DisconnectedError, ValueError, estimate, backend, make(pair(cut)))
        says(error, "update", "gradient", "no_grad", "stop_gradient")

    def test_serves_where_it_is_not(self, backend, cut):
        if cut is in_place:
            pytest.skip("it changes the parameters that it is given, in training too")
        found = estimate(backend, hg.Greedy(pair(cut), response="gradient")).hypergradient["x"]
        plain = estimate(backend, hg.Greedy(pair(step), response="gradient")).hypergradient["x"]
        np.testing.assert_allclose(backend.to_numpy(found), backend.to_numpy(plain), rtol=1e-12)

    def test_is_refused_as_a_fixed_point(self, backend, cut):
        problem = hg.FixedPoint.of_update(RIDGE, pair(cut))
        params, hparams, data = converted(backend, (weights(), strengths(), batches()))
        with pytest.raises(errors.DisconnectedError, match="gradient"):
            hg.hypergradient(problem, params, hparams, data, data[0], hg.Implicit(hg.GMRES()))


class TestRuleThatUsesPartOfTheGradient:
    def test_a_frozen_leaf_is_no_fault(self, backend):
        def update(gradient, opt_state, params, hparams):
            return {"w": params["w"] - 0.05 * gradient["w"], "still": params["still"]}, opt_state

        params = weights() | {"still": np.ones(2)}
        inner = lambda p, h, b: RIDGE.inner(p, h, b) + (p["still"] ** 2).sum()  # noqa: E731
        problem = hg.Bilevel(inner, RIDGE.outer)
        out = estimate(backend, hg.Unrolled(((lambda p: ()), update), 3), problem, params=params)
        np.testing.assert_array_equal(backend.to_numpy(out.state.params["still"]), np.ones(2))
        assert np.all(backend.to_numpy(out.hypergradient["x"]) != 0)


class TestPairOfTheWrongForm:
    @parametrize(
        "init, update, words",
        [
            (lambda p: (), lambda g, s, p: (p, s), ("update(gradient, opt_state, params, hparams)",)),
            (lambda: (), lambda g, s, p, h: (p, s), ("init(params)",)),
            (lambda p: (), lambda g, s, p, h: p, ("update returned dict", "(params, opt_state)")),
        ],
        ids=["update", "init", "result"],
    )
    @parametrize("make", [hg.Greedy, lambda u: hg.Unrolled(u, 2)], ids=["greedy", "unrolled"])
    def test_is_named(self, backend, init, update, words, make):
        says(refused(errors.ArgumentError, ValueError, estimate, backend, make((init, update))), *words)


class TestZeroResponse:
    def loss(self, backend, cut):
        def inner(p, h, b):
            return RIDGE.inner(p, {"x": h["x"]}, b) + (h["y"] ** 2 * cut(p["w"]) ** 2).sum()

        return hg.Bilevel(inner, RIDGE.outer)

    @parametrize(
        "estimator", [hg.Greedy(hg.SGD(0.05)), hg.Unrolled(hg.SGD(0.05), 3), hg.Forward(hg.SGD(0.05), 3)]
    )
    def test_of_a_penalty_on_detached_weights_is_announced_at_the_users_line(self, backend, estimator):
        cut = {"numpy": getval, "torch": lambda w: w.detach(), "jax": lambda w: jax.lax.stop_gradient(w)}
        hparams = strengths() | {"y": np.ones(2)}
        problem = self.loss(backend, cut[backend.name])
        with pytest.warns(errors.ZeroResponseWarning, match=r"hparams\['y'\]") as caught:
            found = estimate(backend, estimator, problem, hparams=hparams).hypergradient
        np.testing.assert_array_equal(backend.to_numpy(found["y"]), np.zeros(2))
        assert np.all(backend.to_numpy(found["x"]) != 0)
        assert all(Path(w.filename).parent.name == "support" for w in caught)

    def test_at_parameters_of_zero_is_no_fault(self, backend, recwarn):
        found = estimate(backend, hg.Greedy(hg.SGD(0.05)), params={"w": np.zeros(2)}).hypergradient
        np.testing.assert_array_equal(backend.to_numpy(found["x"]), np.zeros(2))
        assert not recwarn.list

    def test_may_be_allowed(self, backend, recwarn):
        cut = {"numpy": getval, "torch": lambda w: w.detach(), "jax": lambda w: jax.lax.stop_gradient(w)}
        estimator = hg.Greedy(hg.SGD(0.05), allow_unused=True)
        estimate(
            backend, estimator, self.loss(backend, cut[backend.name]), hparams=strengths() | {"y": np.ones(2)}
        )
        assert not [w for w in recwarn.list if issubclass(w.category, errors.HypergradWarning)]
