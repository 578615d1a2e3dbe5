"""What an estimate takes, and whether two estimates agree."""

from collections import namedtuple

import numpy as np

import hypergrad as hg
from support import frameworks

EXACT = 1e-12


class Given(namedtuple("Given", "problem params hparams train val")):
    @property
    def arguments(self):
        return self.problem, self.params, self.hparams


def estimate(backend, p, estimator, state=None, **changes):
    p = p._replace(**changes)
    state = estimator.init(*p.arguments) if state is None else state
    batches = {"train": p.train, "val": p.val}
    return frameworks.estimate(backend, estimator, p.problem, state, p.hparams, compiled=True, **batches)


def agree(backend, mine, other, tolerance=EXACT):
    """Leaf by leaf, so that a large one hides no small one."""
    assert backend.paths(mine, "") == backend.paths(other, "")
    pairs = zip(*(backend.flatten(tree)[0] for tree in (mine, other)), strict=True)
    for path, (x, y) in zip(backend.paths(mine, ""), pairs, strict=True):
        x, y = backend.to_numpy(x), backend.to_numpy(y)
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), path


def same(backend, mine, other, tolerance=EXACT):
    """Two estimates of one run."""
    agree(backend, mine.hypergradient, other.hypergradient, tolerance)
    for of in (lambda out: (out.state.params, out.state.opt_state), lambda out: out.outer_value):
        agree(backend, of(mine), of(other), tolerance)
    assert int(mine.state.step) == int(other.state.step)


# Of a schedule that holds a number for each step.
rate, inertia = (hg.Schedule(lambda h, t, name=name: h[name][t]) for name in ("lr", "momentum"))
