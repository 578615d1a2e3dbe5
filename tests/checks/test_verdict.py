"""What a check says in words, and whether an estimate is what it claims to be."""

import numpy as np
import pytest
from support.frameworks import each, each_backend

import hypergrad as hg
from hypergrad import errors

PARAMS, LAM = np.array([0.4, -0.3, 0.2]), np.array(-1.0)
RULE = hg.SGD(0.1)


def arrays(backend, dtype="float64"):
    return (backend.asarray(x.astype(dtype), like=None) for x in (PARAMS, LAM))


def check(backend, estimator, penalty=lambda xp, h, p: xp.exp(h) * xp.sum(p**2), target=0.5, **options):
    xp, (params, lam) = backend.xp, arrays(backend)
    problem = hg.Bilevel(
        lambda p, h, b: xp.sum((p - 1.0) ** 4) + penalty(xp, h, p), lambda p, h, b: xp.sum((p - target) ** 2)
    )
    return hg.check_hypergradient(problem, params, lam, None, None, estimator, **options)


@each_backend
@pytest.mark.parametrize("estimator", [hg.Greedy(RULE), hg.Unrolled(RULE, 3), hg.Forward(RULE, 3)], ids=repr)
def test_agreement(backend, estimator):
    found = check(backend, estimator)
    assert found.ok and found.bias < 1e-8 and found.verdict.startswith("agrees to ")
    assert str(found).endswith(found.verdict) and "along 1 direction\n" in str(found)


@each_backend
def test_bias_is_not_an_error(backend):
    two = check(backend, hg.Greedy(hg.SGD(0.001)), target=3.0, steps=2)
    many = check(backend, hg.Greedy(RULE), steps=20)
    assert two.ok and many.ok and min(two.bias, many.bias) > 0.1
    assert "against 2 steps of real training it ignores" in two.verdict
    assert "the direction is right" in two.verdict and "the cosine is -1.00" in many.verdict


@each("numpy", "torch")
def test_a_wrong_estimate_is_called_wrong(backend):
    class Doubled(hg.Greedy.__mro__[1]):
        update, training_steps = RULE, 1

        def _init(self, backend, params):
            return hg.Greedy(RULE)._init(backend, params)

        def _estimate(self, *args):
            out = hg.Greedy(RULE)._estimate(*args)
            return out._replace(hypergradient=2 * out.hypergradient)

        def __repr__(self):
            return "Doubled"

    found = check(backend, Doubled())
    assert not found.ok and found.verdict.startswith("wrong")


@each("numpy", "torch")
def test_both_are_exactly_zero(backend):
    stop = backend.detach if backend.name == "torch" else lambda p: np.array(getattr(p, "_value", p))
    with pytest.warns(errors.ZeroResponseWarning):
        found = check(backend, hg.Unrolled(RULE, 3), lambda xp, h, p: xp.exp(h) * xp.sum(stop(p) ** 2))
    assert "both are exactly zero" in str(found) and "nan" not in str(found)


@each("numpy", "torch")
def test_a_loss_that_is_not_deterministic(backend):
    generator = np.random.default_rng(3)
    found = check(backend, hg.Unrolled(RULE, 3), lambda xp, h, p: (generator.random() + h) * xp.sum(p**2))
    assert not found.ok and "the loss is not deterministic: two evaluations differ by" in found.verdict


@each("torch")
def test_something_detached(backend):
    def weighted(xp, h, p):
        return xp.exp(h) * xp.sum(p**2) * xp.sum(p.detach() ** 2)

    one, three = (check(backend, hg.Unrolled(RULE, steps), weighted) for steps in (1, 3))
    assert one.verdict.startswith("agrees")
    assert "your function is not your training: something is detached" in three.verdict


@each("numpy", "torch")
@pytest.mark.parametrize("seed", range(3))
def test_in_single_precision_the_error_of_differences_is_not_understated(backend, seed):
    xp, rng = backend.xp, np.random.default_rng(seed)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=30)

    def found(dtype):
        a, b, w, h = (
            backend.asarray(v.astype(dtype), like=None) for v in (x, y, np.zeros(3), np.full(3, -2.0))
        )
        mean = lambda w, b: xp.sum((a @ w - b) ** 2) / 30  # noqa: E731
        problem = hg.Bilevel(
            lambda w, h, _: mean(w, b) + xp.sum(xp.exp(h) * w**2), lambda w, h, _: mean(w, 0.5 * b)
        )
        return hg.check_hypergradient(problem, w, h, None, None, hg.Unrolled(hg.SGD(0.1, momentum=0.9), 20))

    single, true = found("float32"), found("float64").exact
    error = np.linalg.norm(single.differences - true) / np.linalg.norm(true)
    assert single.difference_error >= error / 3 and single.ok


@each_backend
def test_newtons_method_takes_shorter_steps_where_whole_ones_fail(backend):
    """∇C̃1 saturates, and a whole Newton step from λ + h would go far away."""
    xp = backend.xp
    problem = hg.Bilevel(lambda y, x, b: xp.sum(xp.sqrt(1e-4 + (y - x) ** 2)), lambda y, x, b: xp.sum(y))
    at = backend.asarray(np.full(2, 5.0), like=None)
    found = hg.check_hypergradient(problem, at, at, None, None, hg.Implicit(hg.CG()))
    assert found.ok and np.allclose(found.differences, 1.0, rtol=1e-6)


@each_backend
def test_an_inner_problem_without_a_solution_is_an_error(backend):
    xp = backend.xp
    problem = hg.Bilevel(lambda y, x, b: xp.sum(xp.exp(-y) * xp.exp(x)), lambda y, x, b: xp.sum(y))
    at = backend.asarray(np.full(2, 0.5), like=None)
    estimator = hg.Implicit(hg.Direct(), checks=hg.Checks(away="ignore"))
    with pytest.raises(errors.InnerNotConvergedError):
        hg.check_hypergradient(problem, at, at, None, None, estimator)


@each_backend
@pytest.mark.parametrize("where", [0.0, 0.7])
def test_a_kink(backend, where):
    xp = backend.xp
    lam = backend.asarray(np.array([where, 0.4]))
    problem = hg.Bilevel(
        lambda p, h, b: xp.sum((p - 1.0) ** 4) + h[1] ** 2 * xp.sum(p**2),
        lambda p, h, b: xp.sum((p - 0.5) ** 2) + 3.0 * xp.maximum(h[0] - 0.7, 0.7 - h[0]),
    )
    found = hg.check_hypergradient(problem, backend.asarray(PARAMS), lam, None, None, hg.Greedy(RULE))
    if where:
        assert found.jump == pytest.approx(6.0) and "differ by 6.0e+00" in found.verdict
        assert "subgradients" in str(found)
    else:
        assert found.jump == 0.0 and found.verdict.startswith("agrees")


@pytest.mark.parametrize("f", [np.exp, np.square, lambda x: np.abs(x) ** 1.5, lambda x: x**3, np.sin])
def test_what_is_smooth_has_no_jump(f):
    from hypergrad.checks.ridders import jump

    assert jump(f, 0.1, f(0.0), 1e-16) == 0.0


def test_each_figure_has_its_own_witness():
    numbers = [np.array(x) for x in ([1.0, 0.0], [1.0, 1.0], [0.0, 2.0])]
    found = hg.checks.Check("it", "training", numbers[0], numbers[1], 0.1 * numbers[1], numbers[2])
    assert found.cosine == pytest.approx(0.5**0.5) and found.exact_cosine == 0.0
    assert found.relative_error == pytest.approx(0.5**0.5)
    assert found.exact_relative_error == pytest.approx(5**0.5 / 2)


def test_what_is_within_the_error_of_the_witness_agrees():
    """Ten times the error of the differences, and half of the digits of the dtype."""
    one = np.array([1.0, 0.0])

    def verdict(away, uncertain, rounding):
        return hg.checks.Check(
            "it", "training", (1 + away) * one, one, uncertain * one, (1 + away) * one, rounding=rounding
        ).verdict

    assert verdict(0.09, 0.01, 0.0).startswith("agrees") and not verdict(0.11, 0.01, 0.0).startswith("agrees")
    assert verdict(0.9e-8, 0.0, 1e-16).startswith("agrees")
    assert not verdict(1.1e-8, 0.0, 1e-16).startswith("agrees")


def test_one_direction_is_named_as_one():
    for count, text in ((1, "along 1 direction\n"), (2, "along 2 directions\n")):
        found = hg.checks.Check("it", "training", *(np.ones(count) for _ in range(4)))
        assert text in str(found)


@pytest.mark.parametrize("shape", [(3,), (100,)], ids=["each coordinate", "directions"])
def test_hyperparameters_are_moved_by_a_tenth_of_their_scale_at_most(shape):
    """So that what must be positive stays so."""
    seen = []

    def outer(p, h, b):
        seen.append(np.array(getattr(h, "_value", h), float))
        return (p**2).sum() + (h**2).sum()

    problem = hg.Bilevel(lambda p, h, b: (p**2).sum() * h.mean(), outer)
    given = np.full(shape, 0.05)
    hg.check_hypergradient(problem, np.ones(2), given, None, None, hg.Greedy(RULE))
    assert 0.04 < max(np.linalg.norm(h - given) for h in seen) / 0.05 <= 0.1 + 1e-12


def test_extrapolation_is_that_of_even_powers():
    """With the factors 4, 16, … of central differences few steps give all digits."""
    from hypergrad.checks.ridders import ridders

    seen = []
    slope, error = ridders(lambda x: seen.append(x) or np.exp(x), 0.5, levels=6)
    assert abs(slope - 1.0) < 1e-12 and error < 1e-10 and len(seen) <= 12
