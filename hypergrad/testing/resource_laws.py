"""Laws of the random generator and of memory."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from hypergrad.backend import Backend
from hypergrad.testing.problems import close, vector


def normal_numbers_follow_from_seed_and_count(backend: Backend) -> None:
    """``normal`` depends on seed and count alone, and does not touch the generator."""
    like, before = backend.asarray(np.ones(3)), repr(backend.random.state())
    drawn = [
        backend.to_numpy(backend.random.normal(s, k, (500, 4), like))
        for s, k in ((1, 2), (1, 2), (1, 3), (2, 2))
    ]
    assert np.array_equal(drawn[0], drawn[1]) and repr(backend.random.state()) == before
    for other in drawn[2:]:
        assert abs(np.corrcoef(drawn[0].ravel(), other.ravel())[0, 1]) < 0.1
    assert abs(drawn[0].mean()) < 0.1 and abs(drawn[0].std() - 1) < 0.1


def randomness_replays(backend: Backend) -> None:
    """A replay and a failed block leave the generator in the state that it had before."""
    before = backend.random.state()
    with backend.random.replay(backend.random.state(seed=1)):
        pass
    assert repr(backend.random.state()) == repr(before)
    backend.random.restore(before)
    assert repr(backend.random.state()) == repr(before)
    with suppress(ZeroDivisionError), backend.random.turn(backend):
        backend.random.restore(backend.random.state(seed=1))
        raise ZeroDivisionError
    assert repr(backend.random.state()) == repr(before)


def states_follow_from_seeds(backend: Backend) -> None:
    """A generator has one state for each seed."""
    one, same, other = (repr(backend.random.state(seed=seed)) for seed in (1, 1, 2))
    assert one == same and (backend.random.state() is None or one != other)


def host_copies_round_trip(backend: Backend) -> None:
    """``from_host`` undoes ``to_host``."""
    x = {"x": vector(backend, 0, 3), "none": None, "n": backend.asarray(np.array(2))}
    back = backend.memory.from_host(backend.memory.to_host(x))
    assert backend.form(back) == backend.form(x)
    close(backend, back, x, 0.0)


def blocks_give_the_same_result(backend: Backend) -> None:
    """``in_blocks`` gives the same as the function on complete arrays, with the sums of all blocks added."""
    xp = backend.xp

    def f(x: Any, y: Any, z: Any) -> Any:
        return [x + 2.0 * z, y * z], (xp.sum(x), xp.sum(y * z))

    for shape in ((7,), (2**10, 2**8), ()):
        x, y, z = (vector(backend, seed, *shape) for seed in range(3))
        expected = [backend.to_numpy(leaf) + 0.0 for leaf in backend.flatten(f(x, y, z))[0]]
        new, sums = backend.memory.in_blocks(f, [x, y], [z])
        close(backend, [*new, *sums], [backend.asarray(values) for values in expected])


RESOURCE_LAWS = (
    normal_numbers_follow_from_seed_and_count,
    randomness_replays,
    states_follow_from_seeds,
    host_copies_round_trip,
    blocks_give_the_same_result,
)
