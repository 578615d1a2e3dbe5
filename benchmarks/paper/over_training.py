"""The runs of figures 2 and 3: a deep net from hardly any regularisation, looked at over training."""

from __future__ import annotations

import argparse

from benchmarks.paper.lab import Lab
from benchmarks.paper.logs import Record
from benchmarks.paper.methods import METHODS
from benchmarks.paper.settings import Setting


def middle(options: argparse.Namespace) -> argparse.Namespace:
    """The data set between MNIST and CIFAR-10: SVHN where its files are, otherwise Fashion-MNIST."""
    if options.data and options.dataset is None:
        options.dataset = "svhn" if (options.data / "svhn").exists() else "fashion-mnist"
    return options


def over_training(lab: Lab) -> dict[str, Record]:
    """By the name of the method, or "fixed", a run with an L2 strength for each layer."""
    layers = lab.settings[0].layers
    setting = Setting("l2-each-" + "-".join(map(str, layers)), layers, ("input_noise", "l2"), False, False)
    start = [setting.filled({"input_noise": 0.05, "l2": 1e-6}, lab.images.shape)]
    found = {}
    for method in (None, *METHODS):
        name = method.name if method else "fixed"
        (found[name],) = lab.logs.job(
            setting,
            f"over-training-{name}",
            lambda method=method: lab.train(setting, method, [lab.seed], start, lab.preset.points),
        )
    return found
