"""Every tape remembers the same run: one hypergradient, whatever is kept and whatever is run again.

Witnesses are the tape `Full` and central differences of training written by hand.
"""

from functools import cache, partial

import autograd
import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.frameworks import NUMPY, dear, each_backend
from support.nightly import rounds
from support.runs import estimate, rate
from support.tapes import (
    AFFORDABLE,
    HEAVY,
    RULES,
    TAPES,
    T,
    drawn,
    each_tape,
    ending,
    few_restarting,
    few_tapes,
    full,
    losses,
    net,
    numpy_tree,
    same,
    start,
)

import hypergrad as hg
from hypergrad.checks.ridders import ridders

parametrize = pytest.mark.parametrize


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
    _, lam, data, val = drawn(LONG)
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


any_tape = st.one_of(
    st.builds(hg.Binomial, slots=st.integers(1, 8)),
    st.sampled_from([hg.States(verify=True), hg.Reversible(), hg.Offload(hg.Binomial(slots=3))]),
)
cuts = st.none() | st.integers(1, T + 2)


class TestProperties:
    @settings(max_examples=rounds(25, 250))
    @given(st.integers(1, T), any_tape, cuts, st.floats(0.05, 0.97), st.integers(0, 10**6), st.booleans())
    def test_any_run(self, steps, tape, truncate, momentum, seed, known):
        p = net(NUMPY, steps=steps, seed=seed)
        rule = hg.SGD(rate, momentum=lambda h: momentum * h["momentum"][0])
        of = partial(hg.Unrolled, rule, truncate=truncate, start=start, allow_unused=True)
        train = p.train if known else ending(p, steps)
        found = estimate(NUMPY, p, of(steps if known else None, tape=tape), train=train)
        same(NUMPY, found, estimate(NUMPY, p, of(steps)), tape)
