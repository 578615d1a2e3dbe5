"""TorchOpt: differentiable optimisers, and implicit differentiation of a root."""

import warnings

import torch
import torchopt
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import solve_cg, solve_normal_cg

from benchmarks.peers.frameworks import MOST, RTOL, Entry, Task
from benchmarks.peers.workloads import RATE

warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)


def entries(task: Task) -> list[Entry]:
    return implicit(task) if task.workload.implicit else unrolled(task)


def unrolled(task: Task) -> list[Entry]:
    inner, outer, workload = task.inner, task.outer, task.workload

    def functional(params, hparams, train, val):
        lam = hparams.clone().requires_grad_()
        names = list(params)
        values = tuple(p.clone().requires_grad_() for p in params.values())
        optimizer = torchopt.FuncOptimizer(torchopt.sgd(RATE, momentum=workload.momentum))
        for _ in range(workload.steps):
            loss = inner(dict(zip(names, values, strict=True)), lam, train)
            values = optimizer.step(loss, values)
        return torch.autograd.grad(outer(dict(zip(names, values, strict=True)), lam, val), lam)[0]

    def meta(params, hparams, train, val):
        lam = hparams.clone().requires_grad_()
        module = Flat(params)
        optimizer = torchopt.MetaSGD(module, RATE, momentum=workload.momentum)
        for _ in range(workload.steps):
            optimizer.step(inner(module.tree(), lam, train))
        return torch.autograd.grad(outer(module.tree(), lam, val), lam)[0]

    return [Entry("torchopt", "MetaSGD", meta), Entry("torchopt", "FuncOptimizer(sgd)", functional)]


class Flat(torch.nn.Module):
    """A module that holds a dict of parameters by name."""

    def __init__(self, params):
        super().__init__()
        self.names = list(params)
        for name, p in params.items():
            self.register_parameter(name, torch.nn.Parameter(p.clone()))

    def tree(self):
        return {name: getattr(self, name) for name in self.names}


def implicit(task: Task) -> list[Entry]:
    def entry(setting, solve) -> Entry:
        def optimality(theta, lam, train):
            return torch.func.grad(task.inner)(theta, lam, train)

        def estimate(params, hparams, train, val):
            lam = hparams.clone().requires_grad_()
            # The optimum is given, as it is to all; what remains is the derivative.
            at = custom_root(optimality, argnums=1, solve=solve)(lambda theta, lam, train: theta)
            return torch.autograd.grad(task.outer(at(params, lam, train), lam, val), lam)[0]

        return Entry("torchopt", setting, estimate)

    return [
        entry("solve_normal_cg, default", None),
        entry("solve_normal_cg, rtol=1e-6", solve_normal_cg(rtol=RTOL, maxiter=MOST)),
        entry("solve_cg, rtol=1e-6", solve_cg(rtol=RTOL, maxiter=MOST)),
    ]
