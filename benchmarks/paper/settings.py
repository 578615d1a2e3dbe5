"""Settings: a network and which hyperparameters it has, and where these begin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.paper.networks import AllConvolutional, Net
from benchmarks.paper.presets import Preset

NOISE, L2 = (0.0, 0.5), (1e-6, 1e-2)
"""Where the random starts are drawn from, evenly and evenly in the logarithm."""
POOR_NOISE, POOR_L2 = (0.5, 2.0), (1e-2, 1e-1)
"""The same with ``--poor``: beyond what anybody would take for reasonable."""


@dataclass(frozen=True)
class Setting:
    """A network, and its hyperparameters: ``tied`` ones are scalars, others have an entry for each layer."""

    name: str
    layers: tuple[int, ...]
    hparams: tuple[str, ...]
    tied: bool
    batch_norm: bool
    convolutional: bool = False

    def net(self, inputs: tuple[int, ...]) -> Net:
        return (AllConvolutional if self.convolutional else Net)(self.layers, inputs, self.batch_norm)

    def width(self, name: str, inputs: tuple[int, ...]) -> tuple[int, ...]:
        layers = len(self.net(inputs).shapes())
        return (
            ()
            if self.tied or name == "input_noise"
            else {"hidden_noise": (layers - 2,), "l2": (layers,)}[name]
        )

    def filled(self, values: dict[str, float], inputs: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {k: np.full(self.width(k, inputs), v, np.float32) for k, v in values.items()}

    def random(self, seed: int, inputs: tuple[int, ...], poor: bool = False) -> dict[str, np.ndarray]:
        """A start in a reasonable interval, as the paper says, or in a poor one; one level for all layers."""
        rng = np.random.default_rng((seed, 2))
        noise = rng.uniform(*(POOR_NOISE if poor else NOISE), size=2)
        l2 = np.exp(rng.uniform(*np.log(POOR_L2 if poor else L2)))
        values = {"input_noise": noise[0], "hidden_noise": noise[1], "l2": l2}
        return self.filled({name: values[name] for name in self.hparams}, inputs)


def with_l2(layers: tuple[int, ...], tied: bool) -> Setting:
    return Setting(f"l2-{suffix(layers, tied)}", layers, ("input_noise", "l2"), tied, False)


def with_noise(layers: tuple[int, ...], tied: bool) -> Setting:
    return Setting(f"noise-{suffix(layers, tied)}", layers, ("input_noise", "hidden_noise"), tied, True)


def suffix(layers: tuple[int, ...], tied: bool) -> str:
    return "-".join(map(str, layers)) + ("" if tied else "-each")


def settings(preset: Preset, dataset: str) -> list[Setting]:
    """The first two are the pairs of figure 1: with L2, without batch normalisation; and with noise alone."""
    if dataset == "cifar10":
        (channels,) = preset.layers
        return [Setting("cnn-noise", channels, ("input_noise", "hidden_noise"), False, True, True)]
    kinds = (with_l2, with_noise)
    return [kind(layers, tied) for layers in preset.layers for tied in preset.tied for kind in kinds]
