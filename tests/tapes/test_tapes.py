"""Every tape remembers the same run: one hypergradient, whatever is kept and whatever is run again.

Witnesses are the tape `Full`, central differences of training written by hand, and a closed form.
"""

import dataclasses
import tracemalloc
import weakref
from collections import namedtuple
from functools import cache, partial

import autograd
import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import frameworks
from support.frameworks import BACKENDS, NUMPY, dear, each, each_backend, on_jax, with_a_generator

import hypergrad as hg
from hypergrad.check import ridders
from hypergrad.errors import (
    ArgumentError,
    FixedPointError,
    HypergradError,
    NonFiniteError,
    ReplayError,
    UnsupportedOpError,
)
from hypergrad.tapes import Shelf, Trajectory
from hypergrad.tapes.binomial import forward_steps
from hypergrad.training import Inner, Training

parametrize = pytest.mark.parametrize
T, ROWS = 12, 6
EXACT, REVERSED = 1e-12, 1e-9

TAPES = {
    "states": hg.States(),
    "binomial-1": hg.Binomial(slots=1),
    "binomial-2": hg.Binomial(slots=2),
    "binomial-4": hg.Binomial(slots=4),
    "binomial-20": hg.Binomial(slots=20),
    "reversible": hg.Reversible(),
    "offload-states": hg.Offload(hg.States()),
    "offload-binomial": hg.Offload(hg.Binomial(slots=3)),
}
VERIFIED = {
    "states": hg.States(verify=True),
    "binomial-1": hg.Binomial(slots=1, verify=True),
    "binomial-3": hg.Binomial(slots=3, verify=True),
    "offload-states": hg.Offload(hg.States(verify=True)),
    "offload-binomial": hg.Offload(hg.Binomial(slots=3, verify=True)),
}
RESTARTING = [tape for name, tape in TAPES.items() if name != "reversible"]  # they hold what was, as it was
AFFORDABLE = [hg.Binomial(slots=2), hg.Reversible()]
MORE = ["binomial-4", "binomial-20"]
each_tape = parametrize("tape", [dear(t) if name in MORE else t for name, t in TAPES.items()], ids=TAPES)
each_verified = parametrize("tape", VERIFIED.values(), ids=VERIFIED)
few_tapes = parametrize("tape", [t if t in AFFORDABLE else dear(t) for t in TAPES.values()], ids=TAPES)
few_restarting = parametrize("tape", [t if t in AFFORDABLE else dear(t) for t in RESTARTING], ids=repr)

rate, inertia = (hg.Schedule(lambda h, t, name=name: h[name][t]) for name in ("lr", "momentum"))
HEAVY = hg.SGD(rate, momentum=inertia, weight_decay=0.01)
RULES = {"sgd": HEAVY, "adam": hg.Adam(rate, beta1=inertia, eps=0.1)}
STEADY = hg.SGD(lambda h: h["lr"][0], momentum=lambda h: h["momentum"][0])


def start(hparams):
    """θ_0 as a function of the hyperparameters, as in MAML; λ takes it in other coordinates."""
    return {"w": 1.0 * hparams["start"]["w"], "v": hparams["start"]["v"] ** 3}


# The problem: a small net with weights for the examples, penalties for the layers, and a rate for each step.
class Net(namedtuple("Net", "problem params hparams train val")):
    @property
    def arguments(self):
        return self.problem, self.params, self.hparams


def losses(xp):
    def residual(params, batch):
        return xp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]

    def inner(params, hparams, batch):
        strengths = xp.exp(hparams["log_l2"])
        penalty = strengths[0] * xp.sum(params["w"] ** 2) + strengths[1] * xp.sum(params["v"] ** 2)
        return xp.mean(hparams["weights"] * residual(params, batch) ** 2) + penalty

    return hg.Bilevel(inner, lambda params, hparams, batch: xp.mean(residual(params, batch) ** 2))


def numbers(steps=T, seed=0):
    """θ, λ, four batches of T1 and one of T2, in NumPy."""
    rng = np.random.default_rng(seed)
    theta = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=4)}
    x, y = rng.normal(size=(5, ROWS, 3)), rng.normal(size=(5, ROWS))
    lam = {
        "lr": rng.uniform(0.03, 0.1, steps),
        "momentum": rng.uniform(0.3, 0.9, steps),
        "log_l2": rng.uniform(-3.0, -2.0, 2),
        "weights": rng.uniform(0.5, 1.5, ROWS),
        "start": {"w": theta["w"], "v": np.cbrt(theta["v"])},
    }
    return theta, lam, {"x": x[:4], "y": y[:4]}, {"x": x[4], "y": y[4]}


def net(backend, steps=T, seed=0, with_start=True):
    theta, lam, data, val = backend.map(backend.asarray, numbers(steps, seed))
    if not with_start:
        del lam["start"]
    return Net(losses(backend.xp), theta, lam, lambda t: backend.map(lambda leaf: leaf[t % 4], data), val)


def estimate(backend, p, estimator, state=None, **changes):
    p = p._replace(**changes)
    state = estimator.init(*p.arguments) if state is None else state
    batches = {"train": p.train, "val": p.val}
    return frameworks.estimate(backend, estimator, p.problem, state, p.hparams, compiled=True, **batches)


def agree(backend, mine, other, tolerance):
    """Leaf by leaf, so that a large one hides no small one."""
    assert backend.paths(mine, "") == backend.paths(other, "")
    pairs = zip(*(backend.flatten(tree)[0] for tree in (mine, other)), strict=True)
    for path, (x, y) in zip(backend.paths(mine, ""), pairs, strict=True):
        x, y = backend.to_numpy(x), backend.to_numpy(y)
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), path


def same(backend, mine, other, tape):
    """Two estimates of one run."""
    tolerance = REVERSED if isinstance(tape, hg.Reversible) else EXACT
    agree(backend, mine.hypergradient, other.hypergradient, tolerance)
    for of in (lambda out: (out.state.params, out.state.opt_state), lambda out: out.outer_value):
        agree(backend, of(mine), of(other), tolerance)
    assert int(mine.state.step) == int(other.state.step)


def numpy_tree(backend, tree):
    return backend.map(backend.to_numpy, tree)


@cache
def full(name, rule, truncate=None, with_start=True):
    """The witness of a framework, compiled once."""
    begin = start if with_start else None
    unrolled = hg.Unrolled(RULES[rule], T, truncate, start=begin, allow_unused=True)
    return estimate(BACKENDS[name], net(BACKENDS[name], with_start=with_start), unrolled)


@each_backend
class TestAgainstFull:  # schedules of rate and momentum, data weights, penalties and a start, all at once
    @each_tape
    def test_all_terms(self, backend, tape):
        found = estimate(backend, net(backend), hg.Unrolled(HEAVY, T, tape=tape, start=start))
        same(backend, found, full(backend.name, "sgd"), tape)

    @few_restarting
    def test_adam(self, backend, tape):
        found = estimate(backend, net(backend), hg.Unrolled(RULES["adam"], T, tape=tape, start=start))
        same(backend, found, full(backend.name, "adam"), tape)

    @parametrize("truncate", [dear(1), 5, dear(T), dear(T + 3)])
    @few_tapes
    def test_truncated(self, backend, tape, truncate):
        p = net(backend, with_start=False)
        found = estimate(backend, p, hg.Unrolled(HEAVY, T, truncate, tape, allow_unused=True))
        same(backend, found, full(backend.name, "sgd", truncate, with_start=False), tape)


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

        before = repr(backend.generator())
        with pytest.raises(ReplayError) as caught:
            estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape), train=train)
        assert caught.value.step == step and isinstance(caught.value, HypergradError)
        assert str(step) in str(caught.value) and repr(backend.generator()) == before

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


def by_hand(theta, lam, data, steps):
    """Training in NumPy, without the library: θ_T."""
    slope = autograd.grad(losses(NUMPY.xp).inner)
    velocity = {name: 0.0 for name in theta}
    for t in range(steps):
        batch = {name: leaf[t % 4] for name, leaf in data.items()}
        gradient = slope(theta, lam, batch)
        for name in theta:
            velocity[name] = lam["momentum"][t] * velocity[name] + gradient[name] + 0.01 * theta[name]
        theta = {name: theta[name] - lam["lr"][t] * velocity[name] for name in theta}
    return theta


LONG = 50


@cache
def differences():
    """Directions, one in each leaf of λ, and slopes of C2 after real training along them."""
    _, lam, data, val = numbers(LONG)
    leaves, spec = optree.tree_flatten(lam)
    rng, outer, found = np.random.default_rng(1), losses(NUMPY.xp).outer, []
    for i, leaf in enumerate(leaves):
        along = rng.normal(size=leaf.shape) * np.abs(leaf).mean() / np.sqrt(leaf.size)

        def trained(h, i=i, along=along):
            moved = spec.unflatten([x + h * along if j == i else x for j, x in enumerate(leaves)])
            return outer(by_hand(start(moved), moved, data, LONG), moved, val)

        slope, doubt = ridders(trained, 0.2)
        assert doubt <= 1e-7 * abs(slope)
        found.append((along, slope))
    return found


@each_backend
class TestRealTraining:  # central differences of 50 steps
    @parametrize("tape", [dear(hg.Full()), *(t if t in AFFORDABLE else dear(t) for t in TAPES.values())])
    def test_of_every_hyperparameter(self, backend, tape):
        p = net(backend, steps=LONG)
        out = estimate(backend, p, hg.Unrolled(HEAVY, LONG, tape=tape, start=start))
        leaves = optree.tree_leaves(numpy_tree(backend, out.hypergradient))
        for leaf, (along, slope) in zip(leaves, differences(), strict=True):
            assert abs(np.sum(leaf * along) - slope) <= 1e-6 * abs(slope)


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
        p = Net(problem, backend.zeros(lam), lam, lambda t: None, None)
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


def ending(p, steps):
    """A function of batches that stops."""

    def train(t):
        if t >= steps:
            raise StopIteration
        return p.train(t)

    return train


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


def normal(backend, *shape):
    """From the framework's own global generator."""
    if backend.name == "torch":
        import torch

        return torch.randn(shape, dtype=torch.float64)
    return np.random.normal(size=shape)


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
        backend.restore(backend.generator(seed=3))
        noise = [normal(backend, ROWS, 3) for _ in range(T)]
        held = estimate(backend, noisy, of(), train=lambda t: noisy.train(t) | {"noise": noise[t]})
        after = repr(backend.generator())
        backend.restore(backend.generator(seed=3))
        found = estimate(backend, noisy, of(tape=tape))
        assert repr(backend.generator()) == after
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

    @parametrize("tape", [hg.Full(), *TAPES.values()], ids=repr)
    def test_of_a_truncated_run_is_flat(self, tape):
        few, many = (self.held(tape, steps, 4) for steps in (8, 40))
        assert many <= 1.1 * few + 64  # the log of `Reversible` is not equally long everywhere


class TestReversible:
    REFUSED = {
        "adam": hg.Adam(0.1),
        "no momentum": hg.SGD(0.1),
        "momentum 0": hg.SGD(0.1, momentum=0.0),
        "nesterov": hg.SGD(0.1, momentum=0.9, nesterov=True),
        "clipped": hg.ClipNorm(hg.SGD(0.1, momentum=0.9), 1.0),
        "a pair": (lambda p: (), lambda g, s, p, h: (p, s)),
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
        return Net(hg.Bilevel(inner, outer), params, hparams, lambda t: None, None)

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
            p = Net(problem, params, hparams, lambda t: t, 0)
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
        theta, lam, data, val = optree.tree_map(small, numbers())
        train = lambda t: backend.map(lambda leaf: leaf[t % 4], data)  # noqa: E731
        p = Net(losses(backend.xp), theta, lam, train, val)
        for tape in (hg.Reversible(), hg.Full()):
            out = estimate(backend, p, hg.Unrolled(HEAVY, T, tape=tape, start=start))
            leaves = backend.flatten((out.hypergradient, out.state.params, out.state.opt_state))[0]
            assert {backend.describe(leaf).dtype for leaf in leaves} == {"float32"}
            yield out.hypergradient

    @with_a_generator
    def test_float32(self, backend):
        agree(backend, *self.single(backend), 1e-4)

    @on_jax
    def test_float32_without_x64(self, backend):
        import jax

        with jax.enable_x64(False):
            agree(backend, *self.single(backend), 1e-4)


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
        from jax.extend.core import jaxprs_in_params

        def size(program):
            return sum(1 + sum(map(size, jaxprs_in_params(row.params))) for row in program.eqns)

        def of(steps):
            p = net(backend, steps=steps, with_start=False)
            unrolled = hg.Unrolled(HEAVY, steps, truncate, tape)
            state = unrolled.init(*p.arguments)
            run = lambda s, h: unrolled.estimate(p.problem, s, h, p.train, p.val)  # noqa: E731
            return size(jax.make_jaxpr(run)(state, p.hparams).jaxpr)

        assert of(200) == of(25)


class TestValues:
    @parametrize("tape", [*TAPES.values(), *VERIFIED.values()], ids=repr)
    def test_are_frozen_comparable_and_printable(self, tape):
        assert tape == dataclasses.replace(tape) and hash(tape) == hash(dataclasses.replace(tape))
        assert type(tape).__name__ in repr(tape) and tape != hg.Full()
        for field in dataclasses.fields(tape):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(tape, field.name, None)

    NONSENSE = {
        "neither slots nor bytes": lambda: hg.Binomial(),
        "slots and bytes": lambda: hg.Binomial(slots=2, max_bytes=1000),
        "no slots": lambda: hg.Binomial(slots=0),
        "half a slot": lambda: hg.Binomial(slots=1.5),
        "a boolean slot": lambda: hg.Binomial(slots=True),
        "no bytes": lambda: hg.Binomial(max_bytes=0),
        "negative bytes": lambda: hg.Binomial(max_bytes=-1),
        "no bits": lambda: hg.Reversible(fraction=0),
        "half a bit": lambda: hg.Reversible(fraction=20.5),
        "no steps": lambda: hg.Unrolled(HEAVY, 0),
        "a start that is none": lambda: hg.Unrolled(HEAVY, 3, start=1.0),
    }

    @parametrize("build", NONSENSE.values(), ids=NONSENSE)
    def test_refuse_nonsense(self, build):
        with pytest.raises(ArgumentError):
            build()


tapes = st.one_of(
    st.builds(hg.Binomial, slots=st.integers(1, 8)),
    st.sampled_from([hg.States(verify=True), hg.Reversible(), hg.Offload(hg.Binomial(slots=3))]),
)
cuts = st.none() | st.integers(1, T + 2)


class TestProperties:
    @settings(max_examples=25)
    @given(st.integers(1, T), tapes, cuts, st.floats(0.05, 0.97), st.integers(0, 10**6), st.booleans())
    def test_any_run(self, steps, tape, truncate, momentum, seed, known):
        p = net(NUMPY, steps=steps, seed=seed)
        rule = hg.SGD(rate, momentum=lambda h: momentum * h["momentum"][0])
        of = partial(hg.Unrolled, rule, truncate=truncate, start=start, allow_unused=True)
        train = p.train if known else ending(p, steps)
        found = estimate(NUMPY, p, of(steps if known else None, tape=tape), train=train)
        same(NUMPY, found, estimate(NUMPY, p, of(steps)), tape)


class TestOuterDerivatives:
    """∂/∂η of a sum of hypergradients: right where states stay what they are, refused where they do not."""

    @staticmethod
    def slope(backend, tape):
        p = net(backend, 4, with_start=False)

        def total(rate):
            rule = hg.SGD(lambda h: h["rate"], momentum=0.5)
            unrolled = hg.Unrolled(rule, 4, tape=tape, allow_unused=True)
            hparams = p.hparams | {"rate": rate}
            state = unrolled.init(p.problem, p.params, hparams)
            out = unrolled.estimate(p.problem, state, hparams, p.train, p.val)
            return backend.xp.sum(out.hypergradient["log_l2"])

        return backend.value_and_grad(total, backend.asarray(np.array(0.05)))[1]

    @parametrize("tape", [hg.States(), hg.Offload(hg.States())], ids=repr)
    @each_backend
    def test_of_what_keeps_states(self, backend, tape):
        exact = backend.to_numpy(self.slope(backend, hg.Full()))
        np.testing.assert_allclose(backend.to_numpy(self.slope(backend, tape)), exact, rtol=1e-11)

    @each_backend
    def test_of_integers(self, backend):
        with pytest.raises(UnsupportedOpError, match="Reversible"):
            self.slope(backend, hg.Reversible())

    @with_a_generator
    def test_of_files(self, backend, tmp_path):
        with pytest.raises(UnsupportedOpError, match="Offload"):
            self.slope(backend, hg.Offload(hg.States(), tmp_path))


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


@with_a_generator
def test_an_open_end_holds_no_more_states_than_it_says(backend):
    alive = weakref.WeakSet()

    class Marked:
        def __init__(self, z):
            self.z = z
            alive.add(self)

    class Watched(Shelf):
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
