"""Rates for each leaf and for each number of the parameters.

The losses are sums over numbers that do not meet, so that the witness is a run of each number by itself, with
one rate.
"""

import numpy as np
import pytest
from support.frameworks import each_backend

import hypergrad as hg
from hypergrad import errors

PARAMS = {"a": np.array([0.3, -0.8, 1.4]), "b": {"c": np.array(0.9)}}
FROM = {"a": np.array([1.0, 0.2, 0.5]), "b": {"c": np.array(-0.4)}}
RATES = {"a": np.array([0.02, 0.05, 0.1]), "b": {"c": np.array(0.07)}}
A_LEAF = {"a": np.array(0.04), "b": {"c": np.array(0.07)}}
A_BRANCH = {"a": np.array(0.04), "b": np.array(0.07)}


def inner(p, lam, at):
    return sum(((x - y) ** 4 + lam["l2"] * x**2).sum() for x, y in zip(leaves(p), leaves(at), strict=True))


def leaves(p):
    return [p["a"], p["b"]["c"]] if isinstance(p, dict) else [p]


PROBLEM = hg.Bilevel(inner, lambda p, lam, at: sum(((x - 0.1) ** 2).sum() for x in leaves(p)))
get = lambda h: h["rates"]  # noqa: E731
RULES = {
    "sgd": hg.SGD(get, weight_decay=0.1),
    "momentum": hg.SGD(get, 0.9, dampening=0.1),
    "nesterov": hg.SGD(0.05, get, True),
    "schedule": hg.SGD(hg.Schedule(lambda h, t: h["rates"])),
    "adam": hg.Adam(get, eps=0.1, weight_decay=0.1),
    "adam-beta": hg.Adam(0.05, beta1=get, eps=1e-3),
    "amsgrad": hg.AdamW(get, eps=0.1, weight_decay=0.2, amsgrad=True),
    "rmsprop": hg.RMSprop(get, momentum=0.5, centered=True, eps=1e-2),
    "adagrad": hg.Adagrad(get, lr_decay=0.1, initial_accumulator=0.1),
    "clipped": hg.ClipNorm(hg.SGD(get), 1e6),
}
"""Learned rates, one of them a momentum and one a decay of means."""
MAKE = {
    "greedy": hg.Greedy,
    "full": lambda rule: hg.Unrolled(rule, 4),
    "states": lambda rule: hg.Unrolled(rule, 4, tape=hg.States()),
    "forward": lambda rule: hg.Forward(rule, 4),
}


def arrays(backend, tree):
    return backend.map(backend.asarray, tree)


def numbers(backend, tree):
    return np.concatenate([np.ravel(backend.to_numpy(x)) for x in backend.flatten(tree)[0]])


def one_by_one(backend, estimator):
    """Derivatives by the rate of each number, and by the penalty."""
    by_rate, by_l2 = [], 0.0
    triples = zip(*(numbers(backend, tree) for tree in (PARAMS, FROM, RATES)), strict=True)
    for x, y, rate in triples:
        given = arrays(
            backend, (np.array(x), {"rates": np.array(rate), "l2": np.array(0.3)}, {"at": np.array(y)})
        )
        problem = hg.Bilevel(lambda p, h, b: inner(p, h, b["at"]), PROBLEM.outer)
        g = hg.hypergradient(problem, given[0], given[1], given[2], None, estimator)
        by_rate.append(float(backend.to_numpy(g["rates"])))
        by_l2 += float(backend.to_numpy(g["l2"]))
    return np.array(by_rate), by_l2


def together(backend, estimator, rates):
    params, hparams, at = arrays(backend, (PARAMS, {"rates": rates, "l2": np.array(0.3)}, FROM))
    return hg.hypergradient(PROBLEM, params, hparams, at, None, estimator)


@each_backend
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rate_for_each_number(backend, make, rule):
    found, (by_rate, by_l2) = together(backend, make(rule), RATES), one_by_one(backend, make(rule))
    np.testing.assert_allclose(numbers(backend, found["rates"]), by_rate, rtol=1e-10)
    np.testing.assert_allclose(float(backend.to_numpy(found["l2"])), by_l2, rtol=1e-10)


@each_backend
@pytest.mark.parametrize("rates", [A_LEAF, A_BRANCH], ids=["leaf", "branch"])
@pytest.mark.parametrize("rule", [RULES["momentum"], RULES["amsgrad"]], ids=["sgd", "adam"])
def test_a_rate_for_each_leaf_is_the_sum_of_those_of_its_numbers(backend, rates, rule):
    estimator = hg.Unrolled(rule, 4)
    spread = {"a": np.full(3, 0.04), "b": {"c": np.array(0.07)}}
    each, found = together(backend, estimator, spread)["rates"], together(backend, estimator, rates)["rates"]
    expected = [numbers(backend, each)[:3].sum(), numbers(backend, each)[3]]
    np.testing.assert_allclose(numbers(backend, found), expected, rtol=1e-12)


@each_backend
def test_a_vector_of_parameters_takes_a_vector_of_rates(backend):
    problem = hg.Bilevel(lambda p, h, b: ((p - 1.0) ** 4).sum(), lambda p, h, b: (p**2).sum())
    p, h = arrays(backend, (np.array([0.1, 0.7]), np.array([0.05, 0.2])))
    found = hg.hypergradient(problem, p, h, None, None, hg.Greedy(hg.SGD(lambda h: h)))
    slope = 4 * (np.array([0.1, 0.7]) - 1.0) ** 3
    expected = -2 * (np.array([0.1, 0.7]) - np.array([0.05, 0.2]) * slope) * slope
    np.testing.assert_allclose(backend.to_numpy(found), expected, rtol=1e-12)


@each_backend
@pytest.mark.parametrize(
    "rates, words",
    [
        ({"a": np.ones(2), "b": np.ones(())}, r"lr .* shape \(2,\) for params\['a'\], .* \(3,\)"),
        ({"a": np.ones(3)}, r"lr .* does not fit .* params\['a'\], params\['b'\]\['c'\]"),
        (np.ones(3), r"lr .* shape \(3,\) for params\['b'\]\['c'\]"),
    ],
    ids=["shape", "structure", "bare"],
)
def test_what_does_not_fit_is_refused(backend, rates, words):
    with pytest.raises(errors.ArgumentError, match=words):
        together(backend, hg.Greedy(hg.SGD(get)), rates)


@each_backend
def test_fixed_point_arithmetic_has_one_rate(backend):
    estimator = hg.Unrolled(hg.SGD(get, 0.9), 4, tape=hg.Reversible())
    with pytest.raises(errors.ArgumentError, match="lr must be one rate for all parameters"):
        together(backend, estimator, RATES)
