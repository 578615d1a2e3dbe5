"""Tapes in programs of JAX."""

import pytest
from support.frameworks import on_jax
from support.runs import estimate
from support.tapes import HEAVY, VERIFIED, T, net, start

import hypergrad as hg
from hypergrad.errors import ArgumentError

parametrize = pytest.mark.parametrize


@on_jax
class TestPrograms:
    @parametrize("tape", VERIFIED.values(), ids=VERIFIED)
    def test_need_no_verification(self, backend, tape):
        p = net(backend)
        with pytest.raises(ArgumentError, match="verify"):
            estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape, start=start))

    LOOPS = [hg.States(), hg.Binomial(slots=3), hg.Reversible(), hg.Offload(hg.Binomial(slots=2))]

    @parametrize("tape, truncate", [*((tape, None) for tape in LOOPS), (hg.Binomial(slots=3), 5)], ids=repr)
    def test_are_as_long_for_many_steps_as_for_few(self, backend, tape, truncate):
        import jax

        def size(value):
            rows = getattr(value, "eqns", ())
            return sum(1 + sum(map(size, jax.tree.leaves(row.params))) for row in rows)

        def of(steps):
            p = net(backend, steps=steps, with_start=False)
            unrolled = hg.Unrolled(HEAVY, steps, truncate, tape)
            state = unrolled.init(*p.arguments)
            run = lambda s, h: unrolled.estimate(p.problem, s, h, p.train, p.val)  # noqa: E731
            return size(jax.make_jaxpr(run)(state, p.hparams).jaxpr)

        assert of(200) == of(25) > 500
