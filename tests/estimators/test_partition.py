"""Rules for groups of parameters: as the same steps written by hand."""

import numpy as np
import pytest
from support.frameworks import each_backend

import hypergrad as hg
from hypergrad import errors

PARAMS = {"body": [np.array([0.4, -0.2]), np.array(0.3)], "head": np.array([0.5, 0.1])}
LAM = {"lr": np.array(0.2), "l2": np.array(-1.0)}
LABELS = {
    "whole-branches": {"body": "slow", "head": "fast"},
    "each-leaf": {"body": ["slow", "slow"], "head": "fast"},
    "function": lambda params: {name: "fast" if name == "head" else "slow" for name in params},
}


def problem(backend):
    xp = backend.xp

    def judged(p, h, b):
        return xp.sum((p["body"][0] * p["head"] + p["body"][1] - 1.0) ** 2)

    def trained(p, h, b):
        return judged(p, h, b) + xp.exp(h["l2"]) * (xp.sum(p["head"] ** 2) + xp.sum(p["body"][0] ** 2))

    return hg.Bilevel(trained, judged)


def arrays(backend, tree):
    return backend.map(lambda x: backend.asarray(x, like=None), tree)


def by_hand(g, s, p, h):
    """Momentum for the body, a learned rate for the head."""
    s = [0.9 * v + d for v, d in zip(s, g["body"], strict=True)]
    body = [x - 0.1 * v for x, v in zip(p["body"], s, strict=True)]
    return {"body": body, "head": p["head"] - h["lr"] * g["head"]}, s


RULES = {"slow": hg.SGD(0.1, momentum=0.9), "fast": hg.SGD(lambda h: h["lr"])}


@each_backend
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("tape", [hg.Full(), hg.States()], ids=repr)
def test_each_group_takes_its_own_step(backend, labels, tape):
    given = arrays(backend, PARAMS), arrays(backend, LAM), None, None
    hand = ((lambda p: [0.0 * x for x in p["body"]]), by_hand)
    run = lambda rule: hg.hypergradient(problem(backend), *given, hg.Unrolled(rule, 4, tape=tape))  # noqa: E731
    got, expected = run(hg.Partition(RULES, labels)), run(hand)
    for name in LAM:
        values = [float(backend.to_numpy(tree[name])) for tree in (got, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize(
    "rules, labels, words",
    [
        (RULES, {"body": "slow", "head": "other"}, "no rule for the label 'other'"),
        (RULES, {"body": "slow"}, "the labels do not fit"),
        ({}, {}, "a dict from labels"),
        ({"a": 3}, "a", "not an update rule"),
    ],
)
def test_what_does_not_fit_is_refused(rules, labels, words):
    numpy = hg.backend.get_backend("numpy")
    with pytest.raises(errors.ArgumentError, match=words):
        hg.hypergradient(problem(numpy), PARAMS, LAM, None, None, hg.Greedy(hg.Partition(rules, labels)))
