"""An MLP 784-3×width-10 with ReLU, in the words of each framework, whose costs are measured."""

from collections.abc import Callable
from typing import Any

IN, OUT, LAYERS = 784, 10, 4


def layers(width: int, normal: Callable[[int, int, int], Any], zeros: Callable[[int], Any]) -> dict[str, Any]:
    """Weights w0, w1, … of variance 1/inputs, and biases b0, b1, …; ``normal`` is a matrix of a layer."""
    sizes = [IN, *[width] * (LAYERS - 1), OUT]
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    weights = {f"w{k}": normal(k, m, n) / m**0.5 for k, (m, n) in enumerate(shapes)}
    return weights | {f"b{k}": zeros(n) for k, (_, n) in enumerate(shapes)}
