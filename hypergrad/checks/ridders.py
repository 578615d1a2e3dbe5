"""Derivatives of real functions by extrapolated differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hypergrad.errors import NonFiniteError


def ridders(
    f: Callable[[float], float], h: float, levels: int = 12, noise: float = 0.0
) -> tuple[float, float]:
    """Return f′(0), by extrapolated central differences with steps h, h/2, h/4, …, and its estimated error.

    Steps at which f is not finite are skipped: the domain may end near 0. With values that are off by
    ``noise`` a difference with step h is off by noise/h at least, even where two of them coincide. (Ridders,
    Advances in Engineering Software 4, 1982.)

    Raises:
        NonFiniteError: if f is not finite at any step.
    """
    best, error, finite = float("nan"), float("inf"), 0
    previous: list[float] = []
    for _ in range(5 * levels):
        with np.errstate(all="ignore"):
            difference = (f(h) - f(-h)) / (2 * h)
        floor = noise / h
        h /= 2
        if not np.isfinite(difference):
            previous = []
            continue
        row = [difference]
        for j, above in enumerate(previous):
            row.append(row[j] + (row[j] - above) / (4.0 ** (j + 1) - 1))
            doubt = max(abs(row[-1] - row[j]), abs(row[-1] - above), floor)
            if doubt <= error:
                best, error = row[-1], doubt
        finite += 1
        settled = error <= 1e-6 * abs(best)
        if finite == levels or (settled and abs(row[-1] - previous[-1]) >= 4 * error):
            break  # smaller steps only add rounding
        previous = row
    if not np.isfinite(best):
        raise NonFiniteError("T2", 0)
    return best, error


def jump(f: Callable[[float], float], h: float, at: float, noise: float = 0.0) -> float:
    """Return f′(0+) − f′(0−), the size of a kink of f at 0, or 0 if there is none above the noise.

    [f(h) − 2 f(0) + f(−h)] / h tends to it, and for a smooth f to 0, as h does. ``at`` is f(0).
    """
    wide, narrow = h / 2**8, h / 2**11
    with np.errstate(all="ignore"):
        far, near = ((f(step) - 2 * at + f(-step)) / step for step in (wide, narrow))
    is_kink = abs(near) > abs(far) / 2 and abs(near) > 20 * noise / narrow
    return near if is_kink and np.isfinite(near) else 0.0
