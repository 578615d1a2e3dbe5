"""What the sweep over torch's operators found is known to the backend, and right in it."""

import json
from pathlib import Path

import pytest

import hypergrad as hg
from hypergrad import errors

torch = pytest.importorskip("torch")
from hypergrad_torch import ModuleTuner  # noqa: E402
from hypergrad_torch.module import losses  # noqa: E402
from hypergrad_torch.unsupported import _WRONG  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

FOUND = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "operators" / "torch.json").read_text(encoding="utf-8")
)


def test_every_wrong_operator_is_refused():
    assert len(FOUND["right"]) > 400
    for name, nodes in FOUND["wrong"].items():
        assert set(nodes) & set(_WRONG), name


def test_every_operator_of_two_formulas_is_evaluated_twice():
    for name, nodes in FOUND["two_formulas"].items():
        assert set(nodes) & losses._TWO_FORMULAS, name


class Solved(nn.Module):
    """A layer that solves a linear system."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Parameter(
            torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(3, 3, dtype=torch.float64)
        )

    def forward(self, x):
        return torch.linalg.solve(self.a, x.T).sum(0)


class Multiplied(Solved):
    """A layer of running products."""

    def forward(self, x):
        return torch.cumprod(x @ self.a, 1).sum(1)


@pytest.mark.parametrize("layer", [Solved, Multiplied])
def test_training_is_the_users_own_bit_for_bit(layer):
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(m, h, b):
        return ((m(b) - 1) ** 2).mean() + h["l2"].exp() * (m.a**2).sum()

    def train(steps):
        module, lam = layer(), {"l2": torch.tensor(-2.0, dtype=torch.float64)}
        return module, lam, torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)

    module, lam, optimizer = train(5)
    tuner = ModuleTuner(module, optimizer, lam, inner=loss, outer=loss, every=1, hyper_update=hg.SGD(0.0))
    for _ in range(5):
        tuner.step(x, x)
    mine = module.a.detach().clone()
    module, lam, optimizer = train(5)
    for _ in range(5):
        optimizer.zero_grad()
        loss(module, lam, x).backward()
        optimizer.step()
    assert torch.equal(mine, module.a)


def test_an_updated_buffer_that_a_loss_holds_is_refused():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    params = {name: p.detach() for name, p in module.named_parameters()}
    lam = torch.tensor(-2.0, dtype=torch.float64)
    judged = lambda p, h, b: (functional_call(module, p, (b,)) ** 2).mean()  # noqa: E731
    trained = lambda p, h, b: judged(p, h, b) + h.exp() * sum((w**2).sum() for w in p.values())  # noqa: E731
    problem, estimator = hg.Bilevel(trained, judged), hg.Unrolled(hg.SGD(0.1), 3)
    with pytest.raises(errors.ArgumentError, match="buffers of a BatchNorm"):
        hg.hypergradient(problem, params, lam, lambda t: x, x, estimator)
    module[1].track_running_stats = False
    module[1].running_mean = module[1].running_var = None
    assert torch.isfinite(hg.hypergradient(problem, params, lam, lambda t: x, x, estimator))
