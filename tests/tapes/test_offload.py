"""Tapes that keep their states in files."""

import tracemalloc

import numpy as np
import pytest
from support.frameworks import NUMPY, on_jax, with_a_generator
from support.runs import agree, estimate
from support.tapes import EXACT, HEAVY, T, ending, full, net, same, start

import hypergrad as hg
from hypergrad.errors import ArgumentError, NonFiniteError

parametrize = pytest.mark.parametrize


class TestOffload:
    INNER = [hg.States(), hg.Binomial(slots=3), hg.States(verify=True), hg.Binomial(slots=2, verify=True)]

    @parametrize("truncate", [None, 4])
    @parametrize("inner", INNER, ids=repr)
    @with_a_generator
    def test_a_directory_is_left_empty(self, backend, inner, truncate, tmp_path):
        p, tape = net(backend, with_start=False), hg.Offload(inner, directory=tmp_path)
        found = estimate(backend, p, hg.Unrolled(HEAVY, T, truncate, tape, allow_unused=True))
        same(backend, found, full(backend.name, "sgd", truncate, with_start=False), tape)
        assert list(tmp_path.iterdir()) == []

    @parametrize("inner", INNER[:2], ids=repr)
    @with_a_generator
    def test_a_directory_of_a_run_without_known_end(self, backend, inner, tmp_path):
        p, tape = net(backend), hg.Offload(inner, directory=str(tmp_path))
        unrolled = hg.Unrolled(HEAVY, None, tape=tape, start=start)
        same(backend, estimate(backend, p, unrolled, train=ending(p, T)), full(backend.name, "sgd"), tape)
        assert list(tmp_path.iterdir()) == []

    @parametrize("slots", [2, 3, 5])
    def test_no_state_of_an_open_end_is_overwritten(self, slots, tmp_path):
        backend = NUMPY
        for length in range(1, 26):
            p, tape = net(backend, length, with_start=False), hg.Binomial(slots=slots)
            found, other = (
                estimate(backend, p, hg.Unrolled(HEAVY, steps, tape=tape), train=batches)
                for steps, tape, batches in (
                    (None, hg.Offload(tape, tmp_path), ending(p, length)),
                    (length, hg.Full(), p.train),
                )
            )
            agree(backend, found.hypergradient, other.hypergradient, EXACT)

    def test_a_directory_holds_what_memory_does_not(self, tmp_path):
        backend, steps, size = NUMPY, 20, 50_000
        problem = hg.Bilevel(lambda w, h, b: h * (w**2).sum(), lambda w, h, b: (w**2).sum())

        def peak(tape):
            estimator = hg.Unrolled(hg.SGD(0.1), steps, tape=tape)
            state = estimator.init(problem, np.ones(size), np.array(0.5))
            tracemalloc.start()
            estimator.estimate(problem, state, np.array(0.5), lambda t: None, None, backend=backend)
            found = tracemalloc.get_traced_memory()[1] / (8 * size)
            tracemalloc.stop()
            return found

        assert peak(hg.States()) - peak(hg.Offload(hg.States(), tmp_path)) > 0.8 * steps

    @parametrize("inner", INNER[:2], ids=repr)
    @with_a_generator
    def test_an_error_leaves_it_empty(self, backend, inner, tmp_path):
        p, tape = net(backend, with_start=False), hg.Offload(inner, directory=tmp_path)
        unrolled = hg.Unrolled(HEAVY, T, tape=tape)

        def broken(t):
            if t == 7:
                raise RuntimeError("no more data")
            return p.train(t)

        with pytest.raises(RuntimeError, match="no more data"):
            estimate(backend, p, unrolled, train=broken)
        nan = lambda t: p.train(t) | {"y": p.train(t)["y"] * float("nan" if t == 7 else 1)}  # noqa: E731
        with pytest.raises(NonFiniteError) as caught:
            estimate(backend, p, unrolled, train=nan)
        assert caught.value.step == 7 and list(tmp_path.iterdir()) == []

    @parametrize("inner", [hg.Full(), hg.Reversible(), hg.Offload(hg.States()), "states"], ids=repr)
    def test_holds_states_and_nothing_else(self, inner):
        with pytest.raises(ArgumentError, match="Offload"):
            hg.Offload(inner)

    @on_jax
    def test_jax_has_no_directory(self, backend, tmp_path):
        p, tape = net(backend), hg.Offload(hg.States(), directory=tmp_path)
        with pytest.raises(ArgumentError, match="directory"):
            estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape, start=start))
        assert list(tmp_path.iterdir()) == []
