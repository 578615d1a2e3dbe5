"""The workloads in PyTorch, eager; hypergrad's entries and those written by hand."""

import gc
import math
import weakref

import numpy
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers.eager import counting as counting
from benchmarks.peers.eager import program as program
from benchmarks.peers.eager import wait as wait
from benchmarks.peers.frameworks import MOST, RTOL, Entry, Task
from benchmarks.peers.losses import Words
from benchmarks.peers.workloads import RATE

NAME = "torch"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


WORDS = Words(torch, torch.tensor, nn.functional.cross_entropy, nn.functional.softplus, torch.mv)


class Passes(TorchDispatchMode):
    """Count the passes over one matrix: products of it, or of its transpose, with a vector."""

    total = 0.0

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.shapes = {tuple(matrix.shape), tuple(matrix.shape[::-1])}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mv, torch.ops.aten.mm, torch.ops.aten.addmv):
            two = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            for matrix, other in (two, two[::-1]):
                if tuple(matrix.shape) in self.shapes:
                    rows = other.shape[0] if matrix is two[0] else other.shape[-1]
                    self.total += other.numel() / rows
                    break
        return out


def products(task: Task, entry: Entry) -> float:
    """Passes over the training matrix, two of which are one product with a Hessian."""
    if not task.workload.implicit:
        return math.nan
    with Passes(task.train[0]) as passes:
        program(task, entry)()
    return passes.total / 2


class Live(TorchDispatchMode):
    """Add up the bytes of the storages that are alive, and keep the peak. Arguments do not count."""

    now, peak = 0, 0

    def __init__(self):
        super().__init__()
        self.alive = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {id(a.untyped_storage()) for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in old or storage in self.alive:
                continue
            self.alive.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, size: int) -> None:
        self.now -= size


def memory(task: Task, entry: Entry) -> float:
    """The peak of live tensor bytes during one run, beyond its arguments."""
    run = program(task, entry)
    gc.collect()
    with Live() as live:
        run()
    return float(live.peak)


def value(found: torch.Tensor) -> numpy.ndarray:
    return found.detach().numpy()


def by_hand(task: Task) -> list[Entry]:
    """The same in torch alone, as one would write it for this problem: no checks, no reports."""
    inner, outer, workload = task.inner, task.outer, task.workload

    def unrolled(params, hparams, train, val):
        lam = hparams.clone().requires_grad_()
        theta = {k: p.clone().requires_grad_() for k, p in params.items()}
        velocity = None
        for _ in range(workload.steps):
            slope = torch.autograd.grad(inner(theta, lam, train), list(theta.values()), create_graph=True)
            if velocity is None or workload.momentum == 0:
                velocity = list(slope)
            else:
                velocity = [workload.momentum * v + g for v, g in zip(velocity, slope, strict=True)]
            theta = {k: p - RATE * v for (k, p), v in zip(theta.items(), velocity, strict=True)}
        return torch.autograd.grad(outer(theta, lam, val), lam)[0]

    def implicit(params, hparams, train, val):
        theta, lam = params.clone().requires_grad_(), hparams.clone().requires_grad_()
        (slope,) = torch.autograd.grad(inner(theta, lam, train), theta, create_graph=True)
        (v,) = torch.autograd.grad(outer(theta, lam, val), theta)
        x, r, p = torch.zeros_like(v), v, v
        rr = first = float(r @ r)
        for _ in range(MOST):
            if rr <= RTOL**2 * first:
                break
            (hp,) = torch.autograd.grad(slope, theta, p, retain_graph=True)
            alpha = rr / float(p @ hp)
            x, r = x + alpha * p, r - alpha * hp
            new = float(r @ r)
            p, rr = r + (new / rr) * p, new
        return -torch.autograd.grad(slope, lam, x)[0]

    if workload.implicit:
        return [Entry("by hand", "CG, 10 lines", implicit)]
    return [Entry("by hand", "autograd through the loop", unrolled)]
