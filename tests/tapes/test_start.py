"""A start of training that depends on the hyperparameters."""

import numpy as np
import pytest
from support import frameworks
from support.frameworks import dear, each_backend
from support.runs import Given, agree, estimate
from support.tapes import (
    AFFORDABLE,
    EXACT,
    HEAVY,
    REVERSED,
    STEADY,
    TAPES,
    T,
    few_tapes,
    full,
    net,
    numpy_tree,
    same,
    start,
)

import hypergrad as hg
from hypergrad.errors import ArgumentError

parametrize = pytest.mark.parametrize
DECAYED = hg.SGD(hg.Schedule(lambda h, t: 0.1 * 0.5**t))


@each_backend
class TestStart:
    @few_tapes
    def test_closed_form_of_a_quadratic(self, backend, tape):
        # θ ← θ − η v, v ← μ v + Hθ: linear in θ_0 = λ, so dC2/dλ is the transposed map of ∇C2.
        A, c = np.random.default_rng(0).normal(size=(2, 3, 3))
        H, eta, mu = A @ A.T / 3 + np.eye(3), 0.1, 0.7
        step = np.block([[np.eye(3) - eta * H, -eta * mu * np.eye(3)], [H, mu * np.eye(3)]])
        expected = np.linalg.matrix_power(step, T)[:3, :3].T @ c[0]
        hessian, slope, lam = (backend.asarray(x) for x in (H, c[0], c[1]))
        problem = hg.Bilevel(lambda p, h, b: 0.5 * p @ hessian @ p, lambda p, h, b: slope @ p)
        p = Given(problem, backend.zeros(lam), lam, lambda t: None, None)
        unrolled = hg.Unrolled(hg.SGD(eta, momentum=mu), T, tape=tape, start=lambda h: 1.0 * h)
        found = backend.to_numpy(estimate(backend, p, unrolled).hypergradient)
        assert np.linalg.norm(found - expected) <= 1e-10 * np.linalg.norm(expected)

    @parametrize("tape", [dear(hg.Full()), *(t if t in AFFORDABLE else dear(t) for t in TAPES.values())])
    def test_is_where_every_estimate_begins(self, backend, tape):
        p = net(backend)
        unrolled = hg.Unrolled(STEADY, 4, tape=tape, start=start)
        state = unrolled.init(*p.arguments)
        run = frameworks.program(
            backend, lambda state: unrolled.estimate(p.problem, state, p.hparams, p.train, p.val)
        )
        first = run(state)  # batches come again after four steps
        again = run(first.state)
        assert int(first.state.step) == 4 and int(again.state.step) == 8
        same(backend, again._replace(state=again.state._replace(step=4)), first, tape)

    @parametrize(
        "rule", [hg.Adam(0.1), hg.SGD(hg.Schedule(lambda h, t: 0.1 * 0.5**t))], ids=["adam", "decayed"]
    )
    @parametrize("make", [hg.Unrolled, hg.Forward])
    def test_renews_the_clock_of_the_optimiser(self, backend, rule, make):
        """Bias corrections and schedules count from the start, and batches go on."""
        p, counts = net(backend), []
        estimator = make(rule, 4, start=start, allow_unused=True)
        train = lambda t: (counts.append(t), p.train(t % 4))[1]  # noqa: E731
        first = estimator.estimate(p.problem, estimator.init(*p.arguments), p.hparams, train, p.val)
        again = estimator.estimate(p.problem, first.state, p.hparams, train, p.val)
        same(backend, again._replace(state=again.state._replace(step=4)), first, None)
        if not backend.compiles:
            assert set(counts) == set(range(8))

    @parametrize("tape", [dear(hg.Full()), *(t if t in AFFORDABLE else dear(t) for t in TAPES.values())])
    def test_is_cut_off_by_truncation(self, backend, tape):
        p = net(backend)
        out = estimate(backend, p, hg.Unrolled(HEAVY, T, 3, tape, start, allow_unused=True))
        assert not any(np.any(leaf) for leaf in numpy_tree(backend, out.hypergradient["start"]).values())
        plain = full(backend.name, "sgd", 3, with_start=False).hypergradient
        rest = {name: leaf for name, leaf in out.hypergradient.items() if name != "start"}
        agree(backend, rest, plain, REVERSED if isinstance(tape, hg.Reversible) else EXACT)

    def test_must_be_as_the_parameters_are(self, backend):
        p = net(backend)
        with pytest.raises(ArgumentError, match="start"):
            estimate(backend, p, hg.Unrolled(HEAVY, T, start=lambda h: {"w": h["start"]["w"]}))
