"""Where values cannot be read without waiting, as on a device: λ survives a fault, and it is raised later."""

import pytest
import torch
from hypergrad_torch import ModuleTuner, TorchBackend
from torch import nn

import hypergrad as hg
from hypergrad import errors

ESTIMATORS = {
    "greedy": (1, lambda o: hg.Greedy(o)),
    "unrolled": (2, lambda o: hg.Unrolled(o, 2)),
    "implicit": (1, lambda o: hg.Implicit(hg.Damped(hg.CG(), 1.0), checks=hg.Checks(away="ignore"))),
}
FAULTS = {
    "a-batch-of-T1": ("train", lambda b: (b[0] * torch.nan, b[1])),
    "a-batch-of-T2": ("val", lambda b: (b[0] * torch.nan, b[1])),
    "an-overflow": ("train", lambda b: (b[0], b[1] * 1e200)),
}


@pytest.fixture(autouse=True)
def unreadable(monkeypatch):
    monkeypatch.setattr(TorchBackend, "readable", lambda self, *leaves: False)
    monkeypatch.setattr(TorchBackend, "number", lambda self, x: None if isinstance(x, torch.Tensor) else x)


def tuner_of(estimator, every):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer, lam = torch.optim.SGD(module.parameters(), 0.1), {"l2": torch.tensor(-2.0)}

    def judged(m, h, b):
        return ((m(b[0]) - b[1]) ** 2).mean()

    def trained(m, h, b):
        return judged(m, h, b) + h["l2"].exp() * sum((p**2).sum() for p in m.parameters())

    tuner = ModuleTuner(
        module, optimizer, lam, inner=trained, outer=judged, every=every, estimator=estimator(optimizer)
    )
    return tuner, lam


def steps(tuner, every, count, faulty=None, fault=None):
    """Take some steps; in the last one the batch of T1 or of T2 has a fault."""
    train, val = (torch.randn(8, 3), torch.randn(8, 1)), (torch.randn(6, 3), torch.randn(6, 1))
    for _ in range(count - 1):
        tuner.step(train, val)
    return tuner.step(fault(train) if faulty == "train" else train, fault(val) if faulty == "val" else val)


@pytest.mark.parametrize("every, estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("faulty, fault", FAULTS.values(), ids=FAULTS)
class TestFaults:
    def test_the_hyperparameters_stay(self, every, estimator, faulty, fault):
        tuner, lam = tuner_of(estimator, every)
        steps(tuner, every, every)
        before = lam["l2"].clone()
        steps(tuner, every, every, faulty, fault)
        assert torch.equal(lam["l2"], before) and torch.isfinite(before)

    @pytest.mark.parametrize("how", ["step", "check", "save"])
    def test_the_fault_is_raised_later(self, every, estimator, faulty, fault, how):
        tuner, _ = tuner_of(estimator, every)
        done = steps(tuner, every, every, faulty, fault)
        later = {
            "step": lambda: steps(tuner, every, 1),
            "check": lambda: tuner.check(done),
            "save": tuner.state_dict,
        }
        with pytest.raises((errors.NonFiniteError, errors.SolveError)):
            later[how]()

    def test_nothing_is_raised_of_sound_updates(self, every, estimator, faulty, fault):
        tuner, _ = tuner_of(estimator, every)
        done = steps(tuner, every, 4 * every)
        tuner.check(done)
        tuner.state_dict()
        assert not tuner._unread
