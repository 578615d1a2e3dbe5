"""What a report says was spent: gradients are evaluations of a loss, and products have closed forms."""

from collections import Counter

import numpy as np
import pytest
from support.arrays import arrays
from support.frameworks import with_a_generator

import hypergrad as hg

T, N = 11, 3
SGD = hg.SGD(0.05, momentum=0.9)


def dense(product, v):
    return np.linalg.solve(np.stack([product(e) for e in np.eye(v.size)], 1), v)


SPENT = {
    "greedy": (hg.Greedy(SGD), 1),
    "full": (hg.Unrolled(SGD, T), T),
    "states": (hg.Unrolled(SGD, T, tape=hg.States()), T),
    "binomial-1": (hg.Unrolled(SGD, T, tape=hg.Binomial(slots=1)), T),
    "binomial-2": (hg.Unrolled(SGD, T, tape=hg.Binomial(slots=2)), T),
    "binomial-3": (hg.Unrolled(SGD, T, tape=hg.Binomial(slots=3)), T),
    "online": (hg.Unrolled(SGD, None, tape=hg.Binomial(slots=3)), T),
    "reversible": (hg.Unrolled(SGD, T, tape=hg.Reversible()), T),
    "offload": (hg.Unrolled(SGD, T, tape=hg.Offload(hg.States())), T),
    "truncated": (hg.Unrolled(SGD, T, 4, hg.States()), 4),
    "forward": (hg.Forward(SGD, T), T * N),  # a product for each entry of λ
    "external": (hg.Implicit(hg.External(dense, rtol=1e-6, on_host=True)), N + 1),  # one for the mixed term
    "direct": (hg.Implicit(hg.Direct()), N + 1),
}


class Counted:
    """Two losses that count how often they are evaluated."""

    def __init__(self):
        self.evaluations = Counter()

    def inner(self, params, hparams, batch):
        self.evaluations["inner"] += 1
        w = params["w"]
        return ((w - batch) ** 2 / 2 + hparams["l2"] * w**2 + w**4).sum()

    def outer(self, params, hparams, batch):
        self.evaluations["outer"] += 1
        return ((params["w"] - batch) ** 2).sum()


@with_a_generator
@pytest.mark.parametrize("name", SPENT)
@pytest.mark.filterwarnings("ignore::hypergrad.errors.InnerNotConvergedWarning")
def test_what_is_reported_was_spent(backend, name):
    estimator, products = SPENT[name]
    losses, w, l2 = Counted(), *arrays(backend, np.full(N, 0.3), np.full(N, 0.1))
    problem = hg.Bilevel(losses.inner, losses.outer)
    batches = [backend.asarray(np.full(N, 0.1 * t)) for t in range(T)]

    def train(t):
        if t == T:
            raise StopIteration
        return batches[t]

    one = isinstance(estimator, hg.Greedy | hg.Implicit)
    state = estimator.init(problem, {"w": w}, {"l2": l2})
    losses.evaluations.clear()
    report = estimator.estimate(problem, state, {"l2": l2}, batches[0] if one else train, batches[1]).report
    assert report.gradients == sum(losses.evaluations.values()) and losses.evaluations["outer"] == 1
    assert report.products == products and report.cost == report.gradients + 2 * products
