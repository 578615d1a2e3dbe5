"""The statistics that test the paper's claims."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """From 0, equal values sharing the mean of theirs."""
    values = np.asarray(values)
    return np.array([((values < v).sum() + (values <= v).sum() - 1) / 2 for v in values])


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; NaN where one of them does not vary."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def bootstrap(
    statistic: Callable[..., float], *columns: np.ndarray, draws: int = 1000
) -> tuple[float, float, float]:
    """The statistic, and the 2.5 and 97.5 % points of it over resampled rows."""
    rng, columns = np.random.default_rng(0), tuple(np.asarray(c) for c in columns)
    rows = rng.integers(len(columns[0]), size=(draws, len(columns[0])))
    found = np.array([statistic(*(column[r] for column in columns)) for r in rows])
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (np.nan, np.nan)
    return statistic(*columns), float(low), float(high)


def shown(interval: tuple[float, float, float], scale: float = 1, digits: int = 2) -> str:
    value, low, high = (scale * x for x in interval)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def grouped(rows: list[dict], *names: str) -> dict[str, list[dict]]:
    """Rows by what they have in these columns."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(", ".join(str(row[name]) for name in names), []).append(row)
    return groups


def column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], float)
