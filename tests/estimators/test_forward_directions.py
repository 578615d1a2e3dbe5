"""Forward mode along random directions."""

import autograd
import numpy as np
import pytest
from support.forward import HEAVY, SIZE, T, fit, flat, full, net, program, start
from support.frameworks import NUMPY, dear, each_backend
from support.runs import agree, estimate, same

import hypergrad as hg

parametrize = pytest.mark.parametrize


def direct(backend, out):
    """∂_λ C2 where training ended, by autograd, as one vector."""
    p = net(NUMPY)
    params = backend.map(backend.to_numpy, out.state.params)
    value = lambda lam: p.problem.outer(params, lam, p.val)  # noqa: E731
    return flat(NUMPY, autograd.grad(value)(p.hparams))


class TestDirections:
    @each_backend
    @parametrize("count", [dear(SIZE), SIZE + 3])
    def test_all_of_them_are_exact(self, backend, count):
        found = estimate(backend, net(backend), fit(HEAVY, T, directions=count))
        same(backend, found, full(backend.name))

    @each_backend
    def test_of_a_start(self, backend):
        found = estimate(backend, net(backend), hg.Forward(HEAVY, T, directions=SIZE, start=start))
        same(backend, found, full(backend.name, with_start=True))

    @each_backend
    @parametrize("count", [dear(1), 4, dear(SIZE - 1)])
    def test_project_the_response_and_leave_the_direct_term(self, backend, count):
        # r̂ = (n/b) P r with a projection P of rank b, so r̂·r = (b/n) ‖r̂‖².
        out = estimate(backend, net(backend), fit(HEAVY, T, directions=count))
        agree(backend, out.state.params, full(backend.name).state.params)
        exact = flat(backend, full(backend.name).hypergradient) - direct(backend, out)
        found = flat(backend, out.hypergradient) - direct(backend, out)
        assert found @ exact == pytest.approx(count / SIZE * (found @ found), rel=1e-10)
        assert np.linalg.norm(found - exact) > 1e-3 * np.linalg.norm(exact)

    def test_are_unbiased(self):
        rng = np.random.default_rng(1)
        x, y, z = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
        inner = lambda w, h, b: ((x @ w - y) ** 2).mean() + (h["l2"] ** 2 * w**2).sum() + h["tilt"] * w.sum()  # noqa: E731
        problem = hg.Bilevel(inner, lambda w, h, b: ((w - z) ** 2).sum())
        lam = {"l2": np.array([0.5, -0.4, 0.7]), "tilt": np.array(0.3)}
        at = (problem, np.zeros(3), lam, lambda t: None, None)
        of = lambda estimator: flat(NUMPY, hg.hypergradient(*at, estimator))  # noqa: E731
        rule, steps, seeds = hg.SGD(0.2, momentum=0.5), 3, 400
        drawn = np.array([of(hg.Forward(rule, steps, 1, seed)) for seed in range(seeds)])
        error = drawn.mean(0) - of(hg.Unrolled(rule, steps))
        assert np.all(np.abs(error) <= 4 * drawn.std(0, ddof=1) / seeds**0.5)
        assert np.linalg.norm(drawn.std(0)) > 0.1 * np.linalg.norm(drawn.mean(0))

    @each_backend
    def test_are_drawn_anew_at_every_estimate(self, backend):
        p, forward = net(backend), fit(HEAVY, T // 2, directions=1)
        run = program(backend, p, forward)
        state = forward.init(*p.arguments)
        first, again = run(state, p.hparams), run(state, p.hparams)
        agree(backend, first.hypergradient, again.hypergradient, 0.0)
        later = run(first.state, p.hparams)
        x, y = (flat(backend, out.hypergradient) - direct(backend, out) for out in (first, later))
        assert abs(x @ y) < 0.99 * np.linalg.norm(x) * np.linalg.norm(y)

    def test_differ_with_the_seed(self):
        found = [
            flat(NUMPY, estimate(NUMPY, net(NUMPY), fit(HEAVY, T, 2, seed)).hypergradient) for seed in (0, 1)
        ]
        assert not np.allclose(*found)

    def test_leave_the_generator_alone(self):
        before = repr(NUMPY.random.state())
        estimate(NUMPY, net(NUMPY), fit(HEAVY, T, directions=2))
        assert repr(NUMPY.random.state()) == before

    @each_backend
    def test_begin_anew_at_every_estimate(self, backend):
        p, half = net(backend), T // 2
        warm = full(backend.name, steps=half).state
        forward = fit(HEAVY, half, directions=SIZE)
        run = program(backend, p, forward)
        second = run(run(forward.init(*p.arguments), p.hparams).state, p.hparams)
        same(backend, second, estimate(backend, p, hg.Unrolled(HEAVY, half, allow_unused=True), warm))
