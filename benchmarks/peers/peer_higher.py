"""higher: training loops on a patched module with a differentiable optimiser. It has nothing implicit."""

import higher
import torch
from torch import nn

from benchmarks.peers.frameworks import Entry, Task
from benchmarks.peers.workloads import LAYERS, RATE


class Network(nn.Module):
    """The MLP as a module, on copies of the same parameters."""

    def __init__(self, params):
        super().__init__()
        for name, p in params.items():
            self.register_parameter(name, nn.Parameter(p.clone()))

    def forward(self, loss, log_l2, batch):
        params = {f"{kind}{k}": getattr(self, f"{kind}{k}") for k in range(LAYERS) for kind in "wb"}
        return loss(params, log_l2, batch)


def entries(task: Task) -> list[Entry]:
    workload = task.workload
    if workload.implicit:
        return []

    def estimate(params, hparams, train, val):
        lam = hparams.clone().requires_grad_()
        module = Network(params)
        optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=workload.momentum)
        with higher.innerloop_ctx(module, optimizer) as (patched, differentiable):
            for _ in range(workload.steps):
                differentiable.step(patched(task.inner, lam, train))
            return torch.autograd.grad(patched(task.outer, lam, val), lam)[0]

    def plain(params, hparams, train, val):
        lam = hparams.clone().requires_grad_()
        names = list(params)
        values = [p.clone().requires_grad_() for p in params.values()]
        optimizer = torch.optim.SGD(values, RATE, momentum=workload.momentum)
        differentiable = higher.optim.DifferentiableSGD(optimizer, values)
        for _ in range(workload.steps):
            loss = task.inner(dict(zip(names, values, strict=True)), lam, train)
            values = differentiable.step(loss, params=values)
        return torch.autograd.grad(task.outer(dict(zip(names, values, strict=True)), lam, val), lam)[0]

    return [Entry("higher", "innerloop_ctx", estimate), Entry("higher", "DifferentiableSGD alone", plain)]
