"""Losses that are not functions: their draws are replayed, and what cannot be replayed is an error."""

import random

import numpy as np
import pytest
from support.frameworks import each

import hypergrad as hg
from hypergrad import errors

STEPS = 4
RULE = hg.SGD(0.1, momentum=0.9)
TAPES = {
    "states": hg.States(),
    "binomial": hg.Binomial(2),
    "one-slot": hg.Binomial(1),
    "offload": hg.Offload(hg.States()),
    "reversible": hg.Reversible(),
}
PARAMS, LAM = np.array([0.4, -0.3, 0.2]), np.array(-1.0)
each_tape = pytest.mark.parametrize("tape", TAPES.values(), ids=TAPES)
eager = each("numpy", "torch")


def problem(backend, noise):
    """A penalised square of parameters that ``noise()`` moves."""
    xp = backend.xp

    def trained(p, h, b):
        shift = backend.asarray(np.asarray(noise(), dtype=float), like=p)
        return xp.sum((p - 1.0 + 0.1 * shift) ** 4) + xp.exp(h) * xp.sum(p**2)

    return hg.Bilevel(trained, lambda p, h, b: xp.sum((p - 0.5) ** 2))


def hypergradient(backend, noise, tape, train=None):
    params, lam = (backend.asarray(x, like=None) for x in (PARAMS, LAM))
    estimator = hg.Unrolled(RULE, STEPS, tape=tape)
    found = hg.hypergradient(problem(backend, noise), params, lam, train, None, estimator)
    return float(backend.to_numpy(found))


DRAWS = {
    "numpy": lambda: np.random.normal(size=3),
    "python": lambda: [random.gauss(0, 1) for _ in range(3)],
    "both": lambda: np.random.normal(size=3) + random.random(),
}


@eager
@each_tape
@pytest.mark.parametrize("noise", DRAWS.values(), ids=DRAWS)
def test_draws_from_the_hosts_generators_are_replayed(backend, tape, noise):
    def seeded(tape):
        random.seed(3)
        np.random.seed(3)
        found = hypergradient(backend, noise, tape)
        return found, random.random(), np.random.random()

    (got, *after), (expected, *wanted) = seeded(tape), seeded(hg.Full())
    assert got == pytest.approx(expected, rel=1e-6 if isinstance(tape, hg.Reversible) else 1e-12)
    assert after == wanted  # the generators go on as after training


@eager
@pytest.mark.parametrize("slots", [1, 2, 6])
def test_a_batch_that_is_drawn_is_drawn_once_though_the_end_of_the_run_is_unknown(backend, slots):
    def drawn(steps, tape):
        def train(t):
            batch = np.random.normal(size=3)
            if t == STEPS:
                raise StopIteration
            return backend.asarray(batch, like=None)

        xp = backend.xp
        params, lam = (backend.asarray(x, like=None) for x in (PARAMS, LAM))
        moved = hg.Bilevel(
            lambda p, h, b: xp.sum((p - 0.1 * b) ** 4) + xp.exp(h) * xp.sum(p**2),
            lambda p, h, b: xp.sum((p - 0.5) ** 2),
        )
        np.random.seed(3)
        found = hg.hypergradient(moved, params, lam, train, None, hg.Unrolled(RULE, steps, tape=tape))
        return float(backend.to_numpy(found)), np.random.random()

    (got, after), (expected, wanted) = drawn(None, hg.Binomial(slots)), drawn(STEPS, hg.Full())
    assert got == pytest.approx(expected, rel=1e-12)
    assert after == wanted  # nothing is left of the draw for the batch that there was not


def counter():
    count = iter(range(1000))
    return lambda: float(next(count))


def private():
    generator = np.random.default_rng(3)
    return lambda: generator.normal(size=3)


def later():
    """Draws nothing in the first two steps."""
    calls = iter(range(1000))
    return lambda: np.random.normal(size=3) if next(calls) > 1 else 0.0


@eager
@each_tape
@pytest.mark.parametrize("make", [counter, private, later])
def test_what_is_not_replayed_is_an_error(backend, tape, make):
    with pytest.raises(errors.ReplayError, match="the training loss of step"):
        hypergradient(backend, make(), tape)


@eager
@each_tape
def test_so_is_a_batch_that_another_call_does_not_return(backend, tape):
    xp, calls = backend.xp, iter(range(1000))
    params, lam = (backend.asarray(x, like=None) for x in (PARAMS, LAM))
    moved = hg.Bilevel(
        lambda p, h, b: xp.sum((p - b) ** 2) + xp.exp(h) * xp.sum(p**2), lambda p, h, b: xp.sum(p**2)
    )
    batch = lambda t: backend.asarray(np.asarray(float(next(calls))), like=params)  # noqa: E731
    with pytest.raises(errors.ReplayError):
        hg.hypergradient(moved, params, lam, batch, None, hg.Unrolled(RULE, STEPS, tape=tape))
