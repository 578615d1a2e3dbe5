"""Labels of which some are wrong, and how well weights tell which."""

import numpy as np
from scipy import stats


def corrupt(labels, share, seed):
    """Other labels for a share of them, and which ones are right."""
    rng = np.random.default_rng((seed, 1))
    right = np.ones(len(labels), bool)
    right[rng.permutation(len(labels))[: round(share * len(labels))]] = False
    return np.where(right, labels, (labels + rng.integers(1, 10, len(labels))) % 10), right


def area(weights, right):
    """Under the ROC curve: how often a right label has more weight than a wrong one."""
    n, m = right.sum(), (~right).sum()
    return float((stats.rankdata(weights)[right].sum() - n * (n + 1) / 2) / (n * m))
