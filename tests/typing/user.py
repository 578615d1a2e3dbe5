"""A user's program, to be checked by mypy and pyright, and run."""

from dataclasses import dataclass

import torch
from hypergrad_torch import ModuleTuner
from torch import Tensor, nn

import hypergrad as hg


@dataclass
class Batch:
    x: Tensor
    y: Tensor


class MyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def outer(model: MyNet, hparams: dict[str, Tensor], batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch.x), batch.y)


def inner(model: MyNet, hparams: dict[str, Tensor], batch: Batch) -> Tensor:
    return outer(model, hparams, batch) + hparams["l2"] * model.layer.weight.square().sum()


net, batch = MyNet(), Batch(torch.randn(8, 3), torch.randn(8, 1))
hparams = {"l2": torch.tensor(0.1)}
optimizer = torch.optim.SGD(net.parameters(), 0.1)
tuner = ModuleTuner(
    net, optimizer, hparams, inner=inner, outer=outer,
    space={"l2": hg.Positive()}, hyper_update=torch.optim.Adam(hparams.values(), 0.01), every=1,
)  # fmt: skip
loss: float = float(tuner.step(batch, batch).inner_value)


def penalty(params: Tensor, log_l2: Tensor, batch: Batch) -> Tensor:
    return (batch.x @ params - batch.y[:, 0]).square().mean() + log_l2.exp() @ params.square()


problem = hg.Bilevel(
    penalty, lambda params, log_l2, batch: (batch.x @ params - batch.y[:, 0]).square().mean()
)
estimator = hg.Greedy(torch.optim.SGD([torch.zeros(1)], 0.1))
state = estimator.init(problem, torch.zeros(3), torch.zeros(3))
out = estimator.estimate(problem, state, torch.zeros(3), batch, batch)
gradient: Tensor = out.hypergradient
implicit = hg.Implicit(hg.CG(5, rtol=None), checks=hg.Checks(away="ignore"))
implicit = hg.Implicit(hg.CG(5, rtol=None), checks=hg.Checks(away="ignore"))
same: Tensor = hg.hypergradient(problem, torch.zeros(3), torch.zeros(3), batch, batch, implicit)
