"""`hg.Reversible`: what it refuses, where it overflows, and how exactly it goes back."""

import dataclasses
from functools import partial

import numpy as np
import optree
import pytest
from support.frameworks import NUMPY, each_backend, on_jax, with_a_generator
from support.runs import Given, agree, estimate
from support.tapes import HEAVY, REVERSED, T, drawn, losses, net, same, start

import hypergrad as hg
from hypergrad.errors import ArgumentError, FixedPointError, HypergradError

parametrize = pytest.mark.parametrize


class TestReversible:
    REFUSED = {
        "adam": hg.Adam(0.1),
        "no momentum": hg.SGD(0.1),
        "momentum 0": hg.SGD(0.1, momentum=0.0),
        "nesterov": hg.SGD(0.1, momentum=0.9, nesterov=True),
        "clipped": hg.ClipNorm(hg.SGD(0.1, momentum=0.9), 1.0),
        "a pair": (lambda p: (), lambda g, s, p, h: (g, s)),
    }

    @parametrize("update", REFUSED.values(), ids=REFUSED)
    def test_refuses_what_cannot_be_reversed(self, update):
        with pytest.raises(ArgumentError, match=r"States|Binomial|Full"):
            estimate(NUMPY, net(NUMPY, with_start=False), hg.Unrolled(update, T, tape=hg.Reversible()))

    def test_refuses_a_momentum_that_turns_out_to_be_zero(self):
        p = net(NUMPY)
        p.hparams["momentum"][4] = 0.0
        with pytest.raises(HypergradError, match=r"States|Binomial|Full"):
            estimate(NUMPY, p, hg.Unrolled(HEAVY, T, tape=hg.Reversible(), start=start))

    @staticmethod
    def far(backend, size):
        """A loss with small slopes at large parameters."""
        xp = backend.xp
        inner = lambda p, h, b: h @ xp.sin(p["near"]) + h @ xp.sin(p["far"])  # noqa: E731
        outer = lambda p, h, b: xp.sum(xp.cos(p["near"])) + xp.sum(xp.cos(p["far"]))  # noqa: E731
        params = {"near": np.array([0.1, 0.2]), "far": size * np.array([0.7, -0.8])}
        params, hparams = backend.map(backend.asarray, (params, np.array([0.5, 0.6])))
        return Given(hg.Bilevel(inner, outer), params, hparams, lambda t: None, None)

    @each_backend
    def test_overflow_names_the_leaf(self, backend):
        unrolled = hg.Unrolled(hg.SGD(0.1, momentum=0.5), 3, tape=hg.Reversible())
        with pytest.raises(FixedPointError, match=r"params\['far'\]") as caught:
            estimate(backend, self.far(backend, 1e6), unrolled)
        assert isinstance(caught.value, HypergradError) and isinstance(caught.value, ArithmeticError)
        assert "fraction" in str(caught.value)

    @with_a_generator
    def test_overflow_on_the_way(self, backend):
        rule = hg.SGD(hg.Schedule(lambda h, t: 1e6 if t == 2 else 0.1), momentum=0.5)
        with pytest.raises(FixedPointError, match=r"params\['(near|far)'\]"):
            estimate(backend, self.far(backend, 1.0), hg.Unrolled(rule, 5, tape=hg.Reversible()))

    @each_backend
    def test_overflow_of_a_velocity_that_turns_round(self, backend):
        # Numbers up to 8 fit: 7 and 7 − 14 do, and 0.1 · 7 − 14 does not.
        slopes = backend.asarray(np.array([7.0, -14.0]))
        problem = hg.Bilevel(
            lambda p, h, b: slopes[b] * (p + h).sum() + (h * p).sum(), lambda p, h, b: (p**2).sum()
        )
        params, hparams = backend.map(backend.asarray, (np.zeros(1), np.zeros(1)))
        tape = hg.Reversible(fraction=60)
        with pytest.raises(FixedPointError):
            p = Given(problem, params, hparams, lambda t: t, 0)
            estimate(backend, p, hg.Unrolled(hg.SGD(0.1, momentum=0.1), 2, tape=tape))

    def test_more_bits_than_there_are(self):
        with pytest.raises(ArgumentError, match="fraction"):
            estimate(NUMPY, net(NUMPY), hg.Unrolled(HEAVY, T, tape=hg.Reversible(64), start=start))

    def test_fewer_bits_reach_further(self):
        p, of = self.far(NUMPY, 1e5), partial(hg.Unrolled, hg.SGD(0.1, momentum=0.5), 3)
        with pytest.raises(FixedPointError):
            estimate(NUMPY, p, of(tape=hg.Reversible()))
        found, other = (estimate(NUMPY, p, of(tape=tape)) for tape in (hg.Reversible(40), hg.Full()))
        agree(NUMPY, found.state.params, other.state.params, 1e-9)
        agree(NUMPY, found.hypergradient, other.hypergradient, 1e-9)

    @staticmethod
    def agrees(backend, p, rule, steps):
        found, other = (
            estimate(backend, p, hg.Unrolled(rule, steps, tape=tape, start=start, allow_unused=True))
            for tape in (hg.Reversible(), hg.Full())
        )
        same(backend, found, other, hg.Reversible())

    @parametrize("momentum", [0.1, 0.5, 0.9])
    def test_goes_back_a_long_way(self, momentum):
        # One wrong bit at the end would be β^−100 of them at the start.
        rule = hg.SGD(lambda h: 0.5 * (1 - momentum) * h["lr"][0], momentum=momentum)
        self.agrees(NUMPY, net(NUMPY), rule, 100)

    @each_backend
    @parametrize("momentum", [0.0, 0.1])
    def test_a_learned_momentum_that_forgets_much(self, backend, momentum):
        # Right, or refused: a compiled program knows neither the momentum nor how much room its log needs.
        p, of = self.far(backend, 1.0), partial(hg.Unrolled, hg.SGD(0.1, momentum=lambda h: h[0]), 60)
        p = p._replace(hparams=backend.asarray(np.array([momentum, 0.6])))
        try:
            found = estimate(backend, p, of(tape=hg.Reversible()))
        except (ArgumentError, FixedPointError) as error:
            assert momentum == 0.0 or backend.name == "jax"
            assert any(tape in str(error) for tape in ("Binomial", "States", "Full"))
        else:
            agree(backend, found.hypergradient, estimate(backend, p, of()).hypergradient, REVERSED)

    def test_dampening_and_decay(self):
        p, more = net(NUMPY), {"dampening": np.array(0.3), "decay": np.array(0.02)}
        rates = {"dampening": lambda h: h["dampening"], "weight_decay": lambda h: h["decay"]}
        p = p._replace(hparams=p.hparams | more)
        self.agrees(NUMPY, p, dataclasses.replace(HEAVY, **rates), T)

    @staticmethod
    def single(backend):
        """Hypergradients in float32, of Reversible and of Full."""
        small = lambda leaf: backend.asarray(np.asarray(leaf, np.float32))  # noqa: E731
        theta, lam, data, val = optree.tree_map(small, drawn())
        train = lambda t: backend.map(lambda leaf: leaf[t % 4], data)  # noqa: E731
        p = Given(losses(backend.xp), theta, lam, train, val)
        for tape in (hg.Reversible(), hg.Full()):
            out = estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape, start=start))
            leaves = backend.flatten((out.hypergradient, out.state.params, out.state.opt_state))[0]
            assert {backend.describe(leaf).dtype for leaf in leaves} == {"float32"}
            yield out.hypergradient

    @with_a_generator
    def test_float32(self, backend):
        agree(backend, *self.single(backend), 1e-4)

    @on_jax
    def test_float32_without_x64(self, backend, request):
        import jax

        jax.config.update("jax_enable_x64", False)
        request.addfinalizer(lambda: jax.config.update("jax_enable_x64", True))
        agree(backend, *self.single(backend), 1e-4)


class TestHalfPrecision:
    @each_backend
    def test_integers_are_those_of_float32(self, backend):
        like = backend.cast(backend.asarray(np.zeros(())), "float16")
        w, h = backend.asarray(np.zeros(2), like=like), backend.asarray(np.ones(2), like=like)
        xp = backend.xp
        problem = hg.Bilevel(lambda w, h, b: xp.sum(0.25 * w * h), lambda w, h, b: xp.sum(w * w - w))
        found = []
        for tape in (hg.States(), hg.Reversible()):
            unrolled = hg.Unrolled(hg.SGD(1e-2, momentum=0.5), 4, tape=tape)
            out = unrolled.estimate(problem, unrolled.init(problem, w, h), h, lambda t: None, None)
            found.append(backend.to_numpy(out.hypergradient))
        assert found[1].dtype == np.float16
        np.testing.assert_allclose(found[1], found[0], rtol=2e-3)


@on_jax
def test_room_for_a_schedule_of_momentum_is_what_one_says(backend):
    p = net(backend, 60, with_start=False)
    falling = hg.SGD(0.05, momentum=hg.Schedule(lambda h, t: 0.95 - 0.014 * t))
    tapes = hg.Full(), hg.Reversible(log_bits=200)
    found = [
        estimate(backend, p, hg.Unrolled(falling, 60, tape=tape, allow_unused=True)).hypergradient
        for tape in tapes
    ]
    agree(backend, found[1], found[0], REVERSED)
