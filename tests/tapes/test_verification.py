"""Tapes that verify what they run again."""

import numpy as np
import pytest
from support.frameworks import with_a_generator
from support.runs import estimate
from support.tapes import HEAVY, RULES, T, each_verified, full, net, same, start

import hypergrad as hg
from hypergrad.errors import HypergradError, ReplayError

parametrize = pytest.mark.parametrize


@with_a_generator
class TestVerified:
    @parametrize("rule", RULES)
    @each_verified
    def test_finds_nothing_where_all_is_well(self, backend, tape, rule):
        found = estimate(backend, net(backend), hg.Unrolled(RULES[rule], T, tape=tape, start=start))
        same(backend, found, full(backend.name, rule), tape)

    @each_verified
    def test_truncated(self, backend, tape):
        p = net(backend, with_start=False)
        found = estimate(backend, p, hg.Unrolled(HEAVY, T, 5, tape, allow_unused=True))
        same(backend, found, full(backend.name, "sgd", 5, with_start=False), tape)

    @parametrize("step", [0, 4, T - 2])
    @each_verified
    def test_names_the_step_whose_batch_is_another_the_second_time(self, backend, tape, step):
        p, calls = net(backend, with_start=False), []

        def train(t):
            batch = p.train(t)
            calls.append(t)
            return batch | {"y": batch["y"] + 1e-9} if t == step and calls.count(t) > 1 else batch

        before = repr(backend.random.state())
        with pytest.raises(ReplayError) as caught:
            estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape), train=train)
        assert caught.value.step == step and isinstance(caught.value, HypergradError)
        assert str(step) in str(caught.value) and repr(backend.random.state()) == before

    @each_verified
    def test_names_the_step_that_counts_from_where_training_stood(self, backend, tape):
        p, calls = net(backend, steps=2 * T, with_start=False), []

        def train(t):
            batch = p.train(t)
            calls.append(t)
            return batch | {"y": batch["y"] + 1e-9} if t == T + 3 and calls.count(t) > 1 else batch

        plain, verified = (hg.Unrolled(HEAVY, T, tape=t) for t in (hg.Full(), tape))
        warm = estimate(backend, p, plain).state
        with pytest.raises(ReplayError) as caught:
            estimate(backend, p, verified, warm, train=train)
        assert caught.value.step == T + 3

    @each_verified
    def test_a_loss_with_a_generator_of_its_own(self, backend, tape):
        p, own = net(backend, with_start=False), np.random.default_rng(0)

        def inner(params, hparams, batch):
            return p.problem.inner(params, hparams, batch | {"y": batch["y"] + own.normal()})

        with pytest.raises(ReplayError) as caught:
            estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape), problem=hg.Bilevel(inner, p.problem.outer))
        assert 0 <= caught.value.step < T
