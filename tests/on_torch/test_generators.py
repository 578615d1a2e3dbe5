"""Generators of devices: read, seeded, restored and replayed, for CUDA, XPU and MPS.

The modules of devices that are not here are stood in for by generators of the CPU.
"""

from types import SimpleNamespace

import numpy as np
import pytest

import hypergrad as hg

torch = pytest.importorskip("torch")
from hypergrad_torch.randomness import generators  # noqa: E402


def stand_in(monkeypatch, kind):
    """Two generators in the place of those of two devices, or of the only one for MPS."""
    own = [torch.Generator().manual_seed(k) for k in range(1 if kind == "mps" else 2)]
    if kind == "mps":
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1)
        monkeypatch.setattr(torch.mps, "get_rng_state", own[0].get_state)
        monkeypatch.setattr(torch.mps, "set_rng_state", own[0].set_state)
    else:
        module = SimpleNamespace(
            is_initialized=lambda: True,
            device_count=lambda: 2,
            get_rng_state_all=lambda: [g.get_state() for g in own],
            set_rng_state_all=lambda states: [g.set_state(x) for g, x in zip(own, states, strict=True)],
        )
        monkeypatch.setattr(torch, kind, module)
    return own


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_draws_of_a_device_are_replayed(monkeypatch, kind):
    if kind != "cuda" and torch.cuda.is_available() and torch.cuda.is_initialized():
        pytest.skip("a process uses one kind of device, and here it is CUDA")
    own, drawn = stand_in(monkeypatch, kind), []

    def inner(w, h, _):
        noise = torch.randn((), generator=own[-1], dtype=torch.float64)
        drawn.append(float(noise))
        return ((w * (1.0 + noise) - 1.0) ** 2).sum() + h * (w**2).sum()

    problem = hg.Bilevel(inner, lambda w, h, _: ((w - 2.0) ** 2).sum())
    w, h = torch.ones(2, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    start, found = generators.state(), []
    for tape in (hg.Full(), hg.States(), hg.Binomial(2)):
        generators.restore(start)
        found.append(
            float(hg.hypergradient(problem, w, h, None, None, hg.Unrolled(hg.SGD(0.05), 5, tape=tape)))
        )
    np.testing.assert_allclose(found, found[0], rtol=1e-12)
    assert len(drawn) > 15 and len(set(drawn)) == 5  # replayed, and from the same state each time


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_failed_estimate_leaves_them_as_they_were(monkeypatch, kind):
    if kind != "cuda" and torch.cuda.is_available() and torch.cuda.is_initialized():
        pytest.skip("a process uses one kind of device, and here it is CUDA")
    own = stand_in(monkeypatch, kind)
    before = [g.get_state() for g in own]

    def inner(w, h, _):
        torch.randn((), generator=own[-1])
        raise ZeroDivisionError

    problem = hg.Bilevel(inner, inner)
    with pytest.raises(ZeroDivisionError):
        hg.hypergradient(problem, torch.ones(2), torch.tensor(0.1), None, None, hg.Greedy(hg.SGD(0.1)))
    assert all(torch.equal(g.get_state(), state) for g, state in zip(own, before, strict=True))
