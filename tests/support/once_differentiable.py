"""Functions of torch that have no second derivative, and the same functions with one."""

from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hypergrad as hg
from support.mixed import Task


class OnceTanh(torch.autograd.Function):
    """tanh, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def attention(kernel, params, x):
    q, k, v = ((x @ w).unsqueeze(0).unsqueeze(0) for w in params["w"])
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(q, k, v)[0, 0] @ params["v"]


def by_tanh(tanh, params, x):
    return tanh(tanh(x @ params["w"][0]) @ params["w"][1]) @ params["v"]


LAYERS = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh())


def by_module(module, params, x):
    weights = {"0.weight": params["w"][0].T, "2.weight": params["w"][1].T}
    prefix = "_orig_mod." if hasattr(module, "_orig_mod") else ""
    named = {prefix + name: weight for name, weight in weights.items()}
    return torch.func.functional_call(module, named, x) @ params["v"]


def compiled(module):
    return torch.compile(module, backend="aot_eager")


# What has no second derivative, and the same function with one.
FUNCTIONS = {
    "flash-attention": lambda: (
        partial(attention, SDPBackend.FLASH_ATTENTION),
        partial(attention, SDPBackend.MATH),
    ),
    "once-differentiable": lambda: (partial(by_tanh, OnceTanh.apply), partial(by_tanh, torch.tanh)),
    "compiled-module": lambda: (partial(by_module, compiled(LAYERS)), partial(by_module, LAYERS)),
    "compiled-function": lambda: (partial(by_tanh, compiled(torch.tanh)), partial(by_tanh, torch.tanh)),
    "compiled-net": lambda: (compiled(partial(by_tanh, torch.tanh)), partial(by_tanh, torch.tanh)),
}
REMEDIES = {"flash": "SDPBackend.MATH", "once": "once_differentiable", "compiled": "compile"}


def torch_task(predict, seed=0):
    """Regression by a function of torch on T1; T2 is the same in either case."""
    gen = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=gen, dtype=torch.float64)

    def error(params, x, y):
        return (predict(params, x) - y).square().mean()

    def inner(params, hparams, b):
        penalty = hparams["log_l2"].exp() * (params["w"].square().sum() + params["v"].square().sum())
        return error(params, b["x"] + hparams["noise"] * b["noise"], b["y"]) + penalty

    params = {"w": draw(3, 4, 4) / 4, "v": draw(4) / 2}
    hparams = {name: torch.tensor(h, dtype=torch.float64) for name, h in (("log_l2", 1.0), ("noise", 0.4))}
    train, val = ({"x": draw(6, 4), "noise": draw(6, 4), "y": draw(6)} for _ in range(2))
    outer = lambda params, hparams, b: error(params, b["x"], b["y"])  # noqa: E731
    return Task(hg.Bilevel(inner, outer), params, hparams, train, val, {})
