"""Long runs: memory, objects and open files do not grow with the steps, apart from the history's numbers."""

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from support.frameworks import each_backend, on_torch
from support.nightly import rounds

import hypergrad as hg

STEPS = rounds(600, 10_000)


def problem_of(backend):
    def mse(w, b):
        return backend.xp.mean((b["x"] @ w - b["y"]) ** 2)

    return hg.Bilevel(
        lambda w, h, b: mse(w, b) + backend.xp.exp(h) * backend.xp.sum(w**2), lambda w, h, b: mse(w, b)
    )


def batch_of(backend):
    rng = np.random.default_rng(0)
    return {"x": backend.asarray(rng.normal(size=(8, 3))), "y": backend.asarray(rng.normal(size=8))}


def memory():
    """The resident bytes of this process, where the system says."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


def files():
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def grows(take_step, held_per_step):
    """Take steps, and compare what is held at the end with what was held after a tenth of them."""
    seen, at = [], [STEPS // 10, STEPS * 11 // 20, STEPS]
    for k in range(STEPS):
        take_step(k)
        if k + 1 in at:
            gc.collect()
            seen.append((sys.getallocatedblocks(), memory(), files()))
    blocks, resident, open_files = np.diff(seen, axis=0).T
    assert open_files.min() <= 0
    # Every object of Python is a block, each header of an array among them. What grows, grows in both halves.
    assert blocks.min() <= 260 + held_per_step * STEPS // 2
    assert resident.min() <= 15_000_000


@each_backend
@pytest.mark.parametrize(
    "estimator",
    [hg.Greedy(hg.Adam(0.01)), hg.Unrolled(hg.SGD(0.01, 0.5), 3, tape=hg.States())],
    ids=["greedy", "unrolled"],
)
def test_of_a_functional_tuner(backend, estimator):
    tuner, batch = hg.Tuner(problem_of(backend), estimator, every=3), batch_of(backend)
    state = tuner.init(backend.asarray(np.zeros(3)), backend.asarray(np.array(-2.0)))

    def take_step(k):
        nonlocal state
        state, _ = tuner.step(state, batch, batch)

    grows(take_step, 0)


@on_torch
@pytest.mark.parametrize("name", ["greedy", "unrolled"])
def test_of_a_tuner_in_place(backend, name):
    import torch
    from hypergrad_torch import ModuleTuner

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    lam = torch.tensor(-2.0, requires_grad=True)
    batch = {"x": torch.randn(8, 3), "y": torch.randn(8)}
    fit = lambda m, h, b: (m(b["x"]).squeeze() - b["y"]).square().mean()  # noqa: E731
    inner = lambda m, h, b: fit(m, h, b) + h.exp() * sum(p.square().sum() for p in m.parameters())  # noqa: E731
    given = {"unrolled": {"estimator": hg.Unrolled(optimizer, 3)}, "greedy": {}}[name]
    tuner = ModuleTuner(model, optimizer, lam, inner=inner, outer=fit, every=3, **given)
    # Losses and rows wait to be joined, at most so many: then they are numbers of the history.
    grows(lambda k: tuner.step(batch, batch), 12)
