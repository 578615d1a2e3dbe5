"""Training until the batches run out."""

import weakref
from functools import partial

import pytest
from support.frameworks import NUMPY, each, each_backend, on_jax, with_a_generator
from support.runs import estimate
from support.tapes import HEAVY, TAPES, VERIFIED, T, ending, full, net, same, start

import hypergrad as hg
from hypergrad.errors import ArgumentError
from hypergrad.problems.step import Inner, Training
from hypergrad.tapes import Storage, Trajectory

parametrize = pytest.mark.parametrize
SOURCES = {
    "list": lambda p: [p.train(t) for t in range(T)],
    "iterator": lambda p: (p.train(t) for t in range(T)),
    "function": lambda p: ending(p, T),
}


class TestUntilTrainRunsOut:  # steps=None
    @parametrize("source", SOURCES.values(), ids=SOURCES)
    @parametrize("tape", [hg.Full(), *TAPES.values(), VERIFIED["binomial-3"]], ids=repr)
    @with_a_generator
    def test_is_as_with_steps(self, backend, tape, source):
        p = net(backend)
        found = estimate(backend, p, hg.Unrolled(HEAVY, None, tape=tape, start=start), train=source(p))
        same(backend, found, full(backend.name, "sgd"), tape)
        assert int(found.state.step) == T

    @parametrize("source", SOURCES.values(), ids=SOURCES)
    @parametrize("tape", [hg.Full(), *TAPES.values()], ids=repr)
    @parametrize("truncate", [5, T + 3])
    @each("numpy")
    def test_truncated(self, backend, tape, source, truncate):
        p = net(backend, with_start=False)
        unrolled = hg.Unrolled(HEAVY, None, truncate, tape, allow_unused=True)
        found = estimate(backend, p, unrolled, train=source(p))
        same(backend, found, full(backend.name, "sgd", truncate, with_start=False), tape)

    @parametrize("length", [1, 2, 3, 7, 30])
    @parametrize("slots", [1, 2, 3])
    @each("numpy")
    def test_any_length(self, backend, slots, length):
        p = net(backend, steps=length)
        of = partial(hg.Unrolled, HEAVY, start=start)
        online = estimate(backend, p, of(None, tape=hg.Binomial(slots=slots)), train=ending(p, length))
        same(backend, online, estimate(backend, p, of(length)), hg.Full())

    @each("numpy", "torch")
    def test_goes_on_from_where_training_stood(self, backend):
        p = net(backend, with_start=False)
        short, rest = hg.Unrolled(HEAVY, 5), hg.Unrolled(HEAVY, None, tape=hg.Binomial(slots=2))
        warm = estimate(backend, p, short).state
        found = estimate(backend, p, rest, warm, train=ending(p, T))
        same(backend, found, estimate(backend, p, hg.Unrolled(HEAVY, T - 5), warm), hg.Full())

    @on_jax
    def test_of_a_list_in_jax(self, backend):
        p, tape = net(backend), hg.Binomial(slots=2)
        unrolled = hg.Unrolled(HEAVY, None, tape=tape, start=start)
        found = estimate(backend, p, unrolled, train=SOURCES["list"](p))
        same(backend, found, full("jax", "sgd"), tape)

    @on_jax
    def test_of_an_iterator_in_jax(self, backend):
        p = net(backend)
        unrolled = hg.Unrolled(HEAVY, None, tape=hg.Binomial(slots=3), start=start)
        state = unrolled.init(*p.arguments)
        found = unrolled.estimate(p.problem, state, p.hparams, SOURCES["iterator"](p), p.val)
        same(backend, found, full("jax", "sgd"), hg.Full())

    @on_jax
    def test_of_a_function_jax_refuses(self, backend):
        p = net(backend)
        unrolled = hg.Unrolled(HEAVY, None, tape=hg.Binomial(slots=3), start=start)
        with pytest.raises(ArgumentError, match="steps"):
            estimate(backend, p, unrolled, train=ending(p, T))
        with pytest.raises(ArgumentError, match="steps"):
            unrolled.estimate(p.problem, unrolled.init(*p.arguments), p.hparams, ending(p, T), p.val)

    @each_backend
    @parametrize("tape", [hg.Full(), hg.States(), hg.Binomial(slots=2)], ids=repr)
    @parametrize("nothing", [[], iter(())], ids=["list", "iterator"])
    def test_of_nothing(self, backend, tape, nothing):
        p = net(backend, with_start=False)
        unrolled = hg.Unrolled(HEAVY, None, tape=tape)
        with pytest.raises(ArgumentError, match="T1"):
            unrolled.estimate(p.problem, unrolled.init(*p.arguments), p.hparams, nothing, p.val)

    @with_a_generator
    def test_of_a_function_that_never_starts(self, backend):
        p = net(backend, with_start=False)
        with pytest.raises(ArgumentError, match="T1"):
            estimate(backend, p, hg.Unrolled(HEAVY, None, tape=hg.Binomial(slots=2)), train=ending(p, 0))

    def test_the_tuner_refuses(self):
        p = net(NUMPY)
        with pytest.raises(ArgumentError, match="steps"):
            hg.Tuner(p.problem, hg.Unrolled(HEAVY, None))


@with_a_generator
def test_an_open_end_holds_no_more_states_than_it_says(backend):
    alive = weakref.WeakSet()

    class Marked:
        def __init__(self, z):
            self.z = z
            alive.add(self)

    class Watched(Storage):
        most = 0

        def put(self, z, place):
            marked = Marked(z)
            Watched.most = max(Watched.most, len(alive))
            return marked

        def take(self, kept):
            return kept.z

    p, slots, length = net(backend, 60, with_start=False), 4, 60
    training = Training(backend, p.problem, hg.SGD(0.05, momentum=0.5))
    path = Trajectory(training, ending(p, length), 0, None)
    z = Inner(p.params, training.update.init(backend, p.params))
    recording = hg.Binomial(slots).record(path, z, p.hparams, Watched())
    recording.pull(Inner(backend.zeros(z.params), backend.zeros(z.opt_state)))
    assert recording.length == length and Watched.most <= slots + 1
