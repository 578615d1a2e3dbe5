"""Noise and statistics in steps that are run again."""

from functools import partial

import numpy as np
import pytest
from support.frameworks import with_a_generator
from support.noise import normal
from support.runs import estimate
from support.tapes import HEAVY, ROWS, TAPES, VERIFIED, T, net, same

import hypergrad as hg

parametrize = pytest.mark.parametrize


@with_a_generator
class TestReplays:
    @pytest.fixture
    def noisy(self, backend):
        """A net whose inputs get noise, of a strength to learn, inside of the loss or from the batch."""
        p = net(backend, with_start=False)

        def inner(params, hparams, batch):
            noise = batch["noise"] if "noise" in batch else normal(backend, ROWS, 3)
            return p.problem.inner(params, hparams, batch | {"x": batch["x"] + hparams["noise"] * noise})

        hparams = p.hparams | {"noise": backend.asarray(np.array(0.5))}
        return p._replace(problem=hg.Bilevel(inner, p.problem.outer), hparams=hparams)

    @parametrize("truncate", [None, 5])
    @parametrize("tape", [*TAPES.values(), *VERIFIED.values()], ids=repr)
    def test_noise_of_the_generator(self, backend, noisy, tape, truncate):
        of = partial(hg.Unrolled, HEAVY, T, truncate, allow_unused=True)
        backend.random.restore(backend.random.state(seed=3))
        noise = [normal(backend, ROWS, 3) for _ in range(T)]
        held = estimate(backend, noisy, of(), train=lambda t: noisy.train(t) | {"noise": noise[t]})
        after = repr(backend.random.state())
        backend.random.restore(backend.random.state(seed=3))
        found = estimate(backend, noisy, of(tape=tape))
        assert repr(backend.random.state()) == after
        same(backend, found, held, tape)

    @parametrize("tape", TAPES.values(), ids=repr)
    def test_statistics(self, backend, tape):
        p, xp = net(backend, with_start=False), backend.xp

        def inner(params, hparams, batch, aux):
            mean = 0.8 * aux["mean"] + 0.2 * xp.mean(batch["x"], axis=0)
            return p.problem.inner(params, hparams, batch | {"x": batch["x"] - mean}), {"mean": mean}

        outer = lambda t, h, b, aux: p.problem.outer(t, h, b | {"x": b["x"] - aux["mean"]})  # noqa: E731
        problem = hg.Bilevel(inner, outer, has_aux=True)
        aux = {"mean": backend.asarray(np.zeros(3))}

        def of(tape):
            unrolled = hg.Unrolled(HEAVY, T, tape=tape)
            state = unrolled.init(problem, p.params, p.hparams, aux=aux)
            return estimate(backend, p, unrolled, state, problem=problem)

        same(backend, of(tape), of(hg.Full()), tape)
