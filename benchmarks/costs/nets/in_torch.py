"""The network and its losses in PyTorch, and what is counted of it there."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.costs.nets import IN, OUT, layers
from benchmarks.shared.networks import squares
from benchmarks.shared.timing import Program


def versions() -> dict[str, Any]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


class Counter(TorchDispatchMode):
    """Add up the FLOPs of matrix products, by torch's own formulas."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(program: Program) -> int:
    with Counter() as counter:
        program()
    return counter.total


def wait(_: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parameters(width: int) -> dict[str, Any]:
    return layers(width, lambda k, m, n: torch.randn(m, n), torch.zeros)


def logits(params, x, noise=None):
    for k in range(4):
        if noise is not None:
            x = x + noise[k] * torch.randn_like(x)
        x = torch.addmm(params[f"b{k}"], x, params[f"w{k}"])
        x = torch.relu(x) if k < 3 else x
    return x


def outer(params, hparams, batch):
    return nn.functional.cross_entropy(logits(params, batch[0]), batch[1])


def with_l2(params, hparams, batch):
    """One strength for each layer."""
    return outer(params, hparams, batch) + squares(torch, params, hparams)


def with_noise(params, hparams, batch):
    """Gaussian noise at the input of each layer, one level for each."""
    return nn.functional.cross_entropy(logits(params, batch[0], hparams), batch[1])


def with_many(params, hparams, batch):
    """A strength for all weights of the second layer, for each of its rows, or for each weight."""
    return outer(params, hparams, batch) + torch.sum(torch.exp(hparams) * params["w1"] ** 2)


def batch_of(size):
    return torch.randn(size, IN), torch.randint(OUT, (size,))
