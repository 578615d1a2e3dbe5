"""Modules of several architectures."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.modules import fit_in_eval, make


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.block = nn.TransformerEncoderLayer(8, 2, 12, **options)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return self.out(self.block(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.groups = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.layer, self.out = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.layer((x + torch.tanh(self.groups(self.conv(x)))).flatten(1)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens, shift):
        return self.out(torch.tanh(self.mix(self.embedding(tokens) + shift)).mean(1))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    )


def drop_net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))


ARCHITECTURES = {
    "convolution-batchnorm": (conv_net, (1, 4, 4)),
    "dropout": (drop_net, (4,)),
    "transformer": (Encoder, (5, 8)),
    "lstm": (Recurrent, (5, 4)),
    "residual-layernorm-groupnorm": (Residual, (4, 2, 2)),
    "tied": (Tied, (3, 5)),
}


def architecture(name, steps=4, **given):
    model, shape = ARCHITECTURES[name]
    if name == "dropout":
        given["outer"] = fit_in_eval
    task = make(model, shape=shape, steps=steps, **given)
    if name == "tied":
        for batch in (*task.train, task.val):
            batch |= {"x": torch.randint(7, (8, 3)), "y": torch.randint(7, (8,))}
    return task
