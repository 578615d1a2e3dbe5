"""Images to train on."""

from pathlib import Path

import numpy as np

from hypergrad.demo.images import load_images


def pooled(folder: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Grey images, from 0 to 1, and labels, training and test together: MNIST of a folder, or the digits."""
    found = load_images("digits" if folder is None else "mnist", folder)
    return np.concatenate([found.x, found.x_test])[..., 0] / 255, np.concatenate([found.y, found.y_test])
