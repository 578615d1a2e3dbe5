"""Batches that run out."""

import pytest
from support.faults import (
    RIDGE,
    SGD,
    batches,
    converted,
    each_loss,
    each_tape,
    estimate,
    every_estimator,
    refused,
    says,
    seen,
    strengths,
    weights,
)

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


class TestExhaustedBatches:
    @every_estimator
    @each_loss
    @parametrize("kind", [list, iter])
    def test_none_at_all(self, backend, estimator, where, data, kind):
        call = (estimate, backend, estimator)
        says(refused(errors.ArgumentError, ValueError, *call, **{data: kind([])}), where)

    @each_tape
    @parametrize("kind", [list, iter])
    def test_fewer_than_the_steps(self, backend, tape, kind):
        call = (estimate, backend, hg.Unrolled(SGD, steps=3, tape=tape))
        train = kind(converted(backend, batches(2)))
        says(refused(errors.ArgumentError, ValueError, *call, train=train), "T1", "2", "3")

    @each_loss
    @parametrize("bad", [lambda given: iter(given[:2]), lambda given: []], ids=["iterator", "empty-list"])
    @parametrize("estimator", [hg.Greedy(SGD), hg.Unrolled(SGD, steps=2)], ids=repr)
    def test_in_the_tuner(self, backend, where, data, bad, estimator):
        given = converted(backend, {"params": weights(), "hparams": strengths(), "train": batches()})
        before = seen(backend, given)
        run, runs = hg.Tuner(RIDGE, estimator, every=1).run, given | {"val": given["train"]}
        runs |= {data: bad(given["train"])}
        says(refused(errors.ArgumentError, ValueError, run, **runs, steps=8), where)
        assert seen(backend, given) == before
