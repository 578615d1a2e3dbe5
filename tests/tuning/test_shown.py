"""What a step, an estimate and a run print: shapes in place of pages of numbers."""

import numpy as np
from support.frameworks import each_backend, program

import hypergrad as hg


@each_backend
def test_they_print_in_a_few_lines(backend):
    xp, n = backend.xp, 200
    params, lam, x = (backend.asarray(v, like=None) for v in (np.ones(n), np.full(n, -2.0), np.eye(n)[:8]))
    problem = hg.Bilevel(
        lambda w, h, b: xp.mean((b @ w) ** 2) + xp.sum(xp.exp(h) * w**2),
        lambda w, h, b: xp.mean((b @ w) ** 2),
    )
    tuner = hg.Tuner(problem, hg.Greedy(hg.Adam(0.05)), every=2)
    state = tuner.init(params, lam)
    run = tuner.run(params, lam, x, x, 4, progress=False)
    for value in (state, tuner.step(state, x, x), run):
        assert len(repr(value)) < 1000 and "float64[200]" in repr(value)
    assert "History(2 updates, 4 training steps)" in repr(run)


@each_backend
def test_small_values_are_shown_and_traced_ones_by_their_shape(backend):
    seen = []

    def show(x):
        seen.append(repr(hg.State({"w": x, **{f"b{i}": x for i in range(9)}})))
        return x

    program(backend, show)(backend.asarray(np.array([0.5, 1.25]), like=None))
    assert ("float64[2]" if backend.compiles else "[0.5, 1.25]") in seen[0] and "… 4 more" in seen[0]
