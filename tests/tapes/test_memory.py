"""How much a tape holds, and how often it runs a step."""

import numpy as np
import pytest
from support.frameworks import NUMPY, each_backend, on_jax, with_a_generator
from support.runs import estimate
from support.tapes import HEAVY, TAPES, T, full, net, same, start

import hypergrad as hg
from hypergrad.errors import ArgumentError
from hypergrad.tapes.binomial import forward_steps

parametrize = pytest.mark.parametrize


class TestBinomial:
    STATE = 2 * 16 * 8  # bytes of θ and its velocity

    @each_backend
    def test_slots_for_so_many_bytes(self, backend):
        p = net(backend)
        tape = hg.Binomial(max_bytes=4 * self.STATE)
        found = estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape, start=start))
        same(backend, found, full(backend.name, "sgd"), tape)
        assert self.STATE <= int(found.report.bytes_held) <= 4 * self.STATE

    @each_backend
    def test_too_few_bytes(self, backend):
        p, tape = net(backend), hg.Binomial(max_bytes=self.STATE - 1)
        with pytest.raises(ArgumentError, match=str(self.STATE)):
            estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape, start=start))

    @parametrize("slots", [1, 2, 3, 8, T, 2 * T])
    def test_runs_no_step_more_often_than_it_must(self, slots):
        p, calls = net(NUMPY, with_start=False), []

        def train(t):
            calls.append(t)
            return p.train(t)

        estimate(NUMPY, p, hg.Unrolled(HEAVY, T, tape=hg.Binomial(slots=slots)), train=train)
        assert len(calls) <= 1 + T + forward_steps(
            T, slots
        )  # the last step may be run again to be pulled back

    @on_jax
    def test_maps_over_hyperparameters(self, backend):
        import jax

        p = net(backend)
        many = jax.tree.map(lambda leaf: jax.numpy.stack([leaf, 1.01 * leaf, 0.9 * leaf]), p.hparams)
        unrolled = hg.Unrolled(HEAVY, T, tape=hg.Binomial(slots=2), start=start)
        state = unrolled.init(*p.arguments)
        one = lambda h: unrolled.estimate(p.problem, state, h, p.train, p.val)  # noqa: E731
        mapped = jax.jit(jax.vmap(one))(many)
        same(backend, jax.tree.map(lambda leaf: leaf[0], mapped), full("jax", "sgd"), unrolled.tape)


class TestMemory:
    @staticmethod
    def held(tape, steps, truncate=None):
        unrolled = hg.Unrolled(HEAVY, steps, truncate, tape, allow_unused=True)
        return int(estimate(NUMPY, net(NUMPY, steps=40, with_start=False), unrolled).report.bytes_held)

    def test_is_less_the_more_is_run_again(self):
        tapes = hg.Binomial(slots=2), hg.Binomial(slots=5), hg.States(), hg.Full()
        found = [self.held(tape, 40) for tape in tapes]
        assert found == sorted(set(found))
        assert self.held(hg.Reversible(), 40) < self.held(hg.States(), 40)

    def test_of_slots_is_flat(self):
        assert self.held(hg.Binomial(slots=4), 10) == self.held(hg.Binomial(slots=4), 40)

    @parametrize(("dtype", "width"), [("float64", 8), ("float32", 4)])
    @with_a_generator
    def test_of_a_reversible_run_is_two_states_a_pool_and_a_log(self, backend, dtype, width):
        """Two bytes for each pool, and log2(1/μ) bits for each step where that is full."""
        problem, n = hg.Bilevel(lambda w, h, b: h * (w**2).sum(), lambda w, h, b: (w**2).sum()), 100

        def held(momentum, steps):
            unrolled = hg.Unrolled(hg.SGD(0.1, momentum=momentum), steps, tape=hg.Reversible())
            w, h = (backend.asarray(x.astype(dtype), like=None) for x in (np.ones(n), np.array(0.3)))
            out = unrolled.estimate(problem, unrolled.init(problem, w, h), h, lambda t: None, None)
            return out.report.bytes_held / n - 2 * width - 2

        assert held(0.5, 4) == held(0.5, 8) == held(0.9, 64) == 0
        for momentum, bits in ((0.5, 1), (0.25, 2)):
            assert held(momentum, 128) - held(momentum, 64) == 64 * bits / 8

    @parametrize("tape", [hg.Full(), *TAPES.values()], ids=repr)
    def test_of_a_truncated_run_is_flat(self, tape):
        few, many = (self.held(tape, steps, 4) for steps in (8, 40))
        assert many <= 1.1 * few + 64  # the log of `Reversible` is not equally long everywhere
