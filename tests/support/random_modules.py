"""Random torch modules from a grammar, and the same modules written plainly.

A program is drawn from a seed: layers, activations, normalisation, dropout, tied and frozen weights, custom
functions, hooks and activation checkpoints. Its plain twin has the same weights, and plain operations in
place of custom functions, no hooks and no checkpoints: by it the true hypergradient is computed.
"""

import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 4


def _function(name, forward, backward, saved):
    """An ``autograd.Function`` of one argument, whose backward pass gets what ``saved`` kept."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = forward(x)
            saved(ctx, x, y)
            return y

        @staticmethod
        def backward(ctx, g):
            return backward(ctx, g)

    Custom.__name__ = Custom.__qualname__ = name
    return Custom


def _input(ctx, x, y):
    ctx.save_for_backward(x)


def _output(ctx, x, y):
    ctx.save_for_backward(y)


def _sigmoid_of_input(ctx, x, y):
    ctx.save_for_backward(x, torch.sigmoid(x))


def _kept(ctx, x, y):
    ctx.y = y.detach()


def _cube(ctx, g):
    (x,) = ctx.saved_tensors
    return 3 * g * x**2


def _tanh(ctx, g):
    (y,) = ctx.saved_tensors
    return g * (1 - y**2)


def _swish(ctx, g):
    x, s = ctx.saved_tensors
    return g * (s + x * s * (1 - s))


def _named(name, forward, backward, saved, plain=None):
    return name, (_function(name, forward, backward, saved), plain or forward)


RIGHT = dict(
    [
        _named("Cube", lambda x: x**3, _cube, _input),
        _named("TanhByOutput", torch.tanh, _tanh, _output),
    ]
)
WRONG = dict(
    [
        _named("SwishBySigmoid", lambda x: x * torch.sigmoid(x), _swish, _sigmoid_of_input, F.silu),
        _named("TanhOnContext", torch.tanh, lambda c, g: g * (1 - c.y**2), _kept),
        _named("Reversed", torch.tanh, lambda c, g: -_tanh(c, g), _output),
    ]
)
ACTIVATIONS = [torch.tanh, torch.sigmoid, F.silu, F.gelu, F.softplus, F.elu, F.relu, F.mish]


class Act(nn.Module):
    """A function without parameters as a module, on which hooks can be put."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Again(nn.Module):
    """A block that runs again in the backward pass."""

    def __init__(self, block, with_context):
        super().__init__()
        from hypergrad_torch import checkpoint_context

        self.block = block
        self.options = {"context_fn": checkpoint_context(block)} if with_context else {}

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False, **self.options)


def program(seed, plain):
    """The module of a seed, in double precision; and the words for what may be refused in it."""
    draw, suspects = random.Random(seed), set()
    torch.manual_seed(seed)
    layers, squares = [nn.Linear(3, WIDTH)], []

    def act():
        return Act(draw.choice(ACTIVATIONS))

    def linear():
        layer = nn.Linear(WIDTH, WIDTH)
        squares.append(layer)
        return layer

    def custom(table, word):
        name, (function, f) = draw.choice(sorted(table.items()))
        suspects.update([word] if word else [])
        return Act(f if plain else function.apply), name

    def hooked():
        block, kind, changes = act(), draw.choice(["full", "pre", "tensor"]), draw.random() < 0.5
        if changes:
            suspects.add("hook")
        scale = (lambda g: 0.5 * g) if changes else (lambda g: None)
        if not plain:
            _hook(block, kind, scale, changes)
        return block

    def block():
        kind = draw.choice(
            ["linear", "linear", "act", "act", "norm", "batchnorm", "dropout", "right", "wrong", "hook"]
            + ["checkpoint", "tied", "frozen"]
        )
        if kind == "linear":
            return linear()
        if kind == "act":
            return act()
        if kind == "norm":
            return draw.choice([nn.LayerNorm(WIDTH), nn.GroupNorm(2, WIDTH)])
        if kind == "batchnorm":
            return nn.BatchNorm1d(WIDTH)
        if kind == "dropout":
            return nn.Dropout(0.3)
        if kind in ("right", "wrong"):
            return custom(*((RIGHT, None) if kind == "right" else (WRONG, "custom")))[0]
        if kind == "hook":
            return hooked()
        if kind == "checkpoint":
            with_context, inside = draw.random() < 0.5, nn.Sequential(linear(), act())
            if not with_context:
                suspects.add("checkpoint")
            return inside if plain else Again(inside, with_context)
        if kind == "tied" and squares:
            return draw.choice(squares)
        frozen = linear()
        frozen.requires_grad_(False)
        return frozen

    for _ in range(draw.randint(1, 5)):
        layers.append(block())
    layers.append(nn.Linear(WIDTH, 1))
    return nn.Sequential(*layers).double(), suspects


def _hook(module, kind, scale, changes):
    if kind == "full":
        module.register_full_backward_hook(lambda m, after, before: (scale(after[0]),) if changes else None)
    elif kind == "pre":
        module.register_full_backward_pre_hook(lambda m, before: (scale(before[0]),) if changes else None)
    else:
        module.register_forward_hook(
            lambda m, x, y: y.register_hook(scale) and None if y.requires_grad else None
        )
