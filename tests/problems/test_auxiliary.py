"""Auxiliary state: what a model updates while it trains is carried along, a constant of every derivative."""

from functools import cache, partial

import numpy as np
import pytest
from support.differences import five_point
from support.frameworks import on_torch

import hypergrad as hg
from hypergrad.errors import ArgumentError
from hypergrad.testing.calculus import value_and_grad
from hypergrad.testing.problems import close, regression, vector

LR, MOMENTUM = 0.1, 0.9
RULE = hg.SGD(LR, momentum=MOMENTUM)
FROZEN = hg.SGD(0.0)
ANYWHERE = {"checks": hg.Checks(away="ignore")}
GREEDY, DIFFERENCED = hg.Greedy(RULE), hg.Greedy(RULE, products=hg.FiniteDifference())
UNROLLED = [hg.Unrolled(RULE, 4), hg.Unrolled(RULE, 4, tape=hg.States())]
TRUNCATED = hg.Unrolled(RULE, 4, truncate=2, tape=hg.States())
IMPLICIT = hg.Implicit(hg.Identity(0.1), **ANYWHERE)


def named(estimator):
    """A short name for the list of tests."""
    if not isinstance(estimator, hg.HypergradientEstimator):
        return "" if isinstance(estimator, dict) else str(estimator)
    details = {"truncate": "truncated", "mixed": "differenced"}
    found = [word for name, word in details.items() if getattr(estimator, name, None)]
    tape = [type(estimator.tape).__name__] if hasattr(estimator, "tape") else []
    return "-".join([type(estimator).__name__, *tape, *found])


class Net:
    """A hidden layer with BatchNorm; an integer counter draws its input noise from a table.

    The inner loss normalises by the statistics of the batch and moves the running ones, by which the outer
    loss normalises. Hyperparameters: two log L2 strengths, and log gains of the inputs.
    """

    def __init__(self, backend):
        self.backend, self.xp = backend, backend.xp
        self.problem = hg.Bilevel(self.inner, self.outer, has_aux=True)
        self.params = {"w": vector(backend, 1, 3, 4), "v": vector(backend, 2, 4)}
        self.hparams = {"log_l2": self.array([-3.0, -2.0]), "gain": self.array([0.1, -0.2, 0.3])}
        self.aux = {
            "norm": (self.array([0.2, 0.1, 0.0, -0.1]), self.array([2.0, 1.0, 1.5, 0.5])),
            "count": self.array(3),
        }
        self.train, self.val = (
            {"x": vector(backend, s, 8, 3), "y": vector(backend, s + 1, 8)} for s in (3, 5)
        )
        self.train |= {"noise": vector(backend, 7, 40, 8, 3), "drift": self.array(0.0)}
        self.step = backend.compile(self._step)
        self.program = cache(self._program)

    def array(self, values):
        return self.backend.asarray(np.array(values))

    def flat(self, tree):
        return self.backend.to_numpy(self.backend.ravel(tree)[0])

    # The problem.

    def error(self, params, hidden, batch):
        return self.xp.mean((self.xp.tanh(hidden) @ params["v"] - batch["y"]) ** 2)

    def inner(self, params, hparams, batch, aux):
        xp, (mean, var), count = self.xp, aux["norm"], aux["count"]
        x = (batch["x"] + 0.3 * batch["noise"][count]) * xp.exp(hparams["gain"])
        hidden, l2 = x @ params["w"], xp.exp(hparams["log_l2"])
        centre = xp.mean(hidden, axis=0)
        spread = xp.mean((hidden - centre) ** 2, axis=0)
        loss = self.error(params, (hidden - centre) / xp.sqrt(spread + 1e-3), batch)
        loss = loss + l2[0] * xp.sum(params["w"] ** 2) + l2[1] * xp.sum(params["v"] ** 2)
        loss = loss + batch["drift"] * xp.sum((centre - mean) ** 2 / var)
        return loss, {"norm": (0.7 * mean + 0.3 * centre, 0.7 * var + 0.3 * spread), "count": count + 1}

    def outer(self, params, hparams, batch, aux):
        mean, var = aux["norm"]
        hidden = (batch["x"] * self.xp.exp(hparams["gain"])) @ params["w"]
        return self.error(params, (hidden - mean) / self.xp.sqrt(var + 1e-3), batch)

    # Training by hand, and its derivative by hand.

    def _step(self, params, velocity, aux, hparams, batch):
        def loss(params):
            return self.inner(params, hparams, batch, aux)[0]

        velocity = self.backend.axpy(MOMENTUM, velocity, value_and_grad(self.backend, loss, params)[1])
        new = self.inner(params, hparams, batch, aux)[1]
        return self.backend.axpy(-LR, velocity, params), velocity, new

    def trained(self, steps, hparams=None, start=None, batch=None):
        """Parameters, velocity and auxiliary state after so many steps."""
        z = start or (self.params, self.backend.zeros(self.params), self.aux)
        for _ in range(steps):
            z = self.step(*z, hparams or self.hparams, batch or self.train)
        return z

    def slopes(self, steps, skipped=0, judged_by=None, h=1e-3):
        """Five-point differences of C2 by each hyperparameter, through the last steps of training.

        C2 is judged with the auxiliary state given, or that of the training at hand.
        """
        begin, x = self.trained(skipped), self.flat(self.hparams)
        unravel = self.backend.ravel(self.hparams)[1]

        def value(x):
            hparams = unravel(self.backend.asarray(x))
            params, _, aux = self.trained(steps - skipped, hparams, begin)
            return float(self.backend.to_numpy(self.outer(params, hparams, self.val, judged_by or aux)))

        def slope(axis):
            return five_point(lambda shift: value(x + shift * axis), h)

        return np.array([slope(axis) for axis in np.eye(x.size)])

    # The library's.

    def _program(self, estimator):
        def estimate(state, train):
            return estimator.estimate(self.problem, state, self.hparams, lambda t: train, self.val)

        return self.backend.compile(estimate)

    def estimate(self, estimator, state=None, train=None):
        state = state or estimator.init(self.problem, self.params, self.hparams, aux=self.aux)
        return estimator.check(self.program(estimator)(state, train or self.train))

    def run(self, tuner, steps, **options):
        return tuner.run(self.params, self.hparams, self.train, self.val, steps, aux=self.aux, **options)

    def attempt(self, problem, estimator, **aux):
        """The hypergradient of other losses."""
        given = problem, self.params, self.hparams, lambda t: self.train, self.val, estimator
        return self.flat(hg.hypergradient(*given, **({"aux": self.aux} | aux)))


net_of = cache(Net)


@pytest.fixture
def net(backend):
    return net_of(backend)


def relative(mine, other):
    return np.linalg.norm(mine - other) / np.linalg.norm(other)


def rounding(estimator):
    """A finite difference in steps of 1e-5 magnifies it."""
    return 1e-9 if isinstance(getattr(estimator, "products", None), hg.FiniteDifference) else 1e-12


class TestHypergradients:
    @pytest.mark.parametrize(
        "estimator, skipped",
        [(GREEDY, 0), (DIFFERENCED, 0), *((e, 0) for e in UNROLLED), (TRUNCATED, 2)],
        ids=named,
    )
    def test_are_central_differences_of_training(self, net, estimator, skipped):
        steps = estimator.training_steps
        expected = net.slopes(steps, skipped, judged_by=net.trained(steps)[2])
        assert relative(net.flat(net.estimate(estimator).hypergradient), expected) <= 1e-6

    def test_leave_out_how_the_statistics_would_have_changed(self, net):
        held, real = net.slopes(4, judged_by=net.trained(4)[2]), net.slopes(4)
        assert relative(held, real) > 0.01

    def test_are_checked_with_the_statistics_of_training_at_hand(self, net):
        check = hg.check_hypergradient(
            net.problem, net.params, net.hparams, net.train, net.val, GREEDY, aux=net.aux
        )
        assert relative(check.differences, net.slopes(1, judged_by=net.trained(1)[2])) <= 1e-6
        assert check.relative_error <= 1e-6 and check.exact_relative_error <= 1e-12

    @pytest.mark.parametrize("products", [hg.Exact(), hg.FiniteDifference()], ids=["exact", "differenced"])
    def test_at_an_optimum_take_the_state_as_it_is(self, net, products):
        estimator = hg.Implicit(hg.Identity(0.1), products=products, **ANYWHERE)
        alone = hg.Bilevel(
            lambda p, h, b: net.inner(p, h, b, net.aux)[0], lambda p, h, b: net.outer(p, h, b, net.aux)
        )
        expected = hg.hypergradient(alone, net.params, net.hparams, net.train, net.val, estimator)
        out = net.estimate(estimator)
        assert relative(net.flat(out.hypergradient), net.flat(expected)) <= rounding(estimator)
        close(net.backend, out.state.aux, net.aux, 0.0)


class TestItIsConstant:
    """Both losses read the running statistics here; written into them as numbers, they give the same."""

    @pytest.mark.parametrize("estimator", [GREEDY, DIFFERENCED, *UNROLLED], ids=named)
    def test_in_every_derivative(self, net, estimator):
        train = net.train | {"drift": net.array(1.0)}
        steps = [net.trained(t, batch=train)[2] for t in range(estimator.training_steps + 1)]
        written = hg.Bilevel(
            lambda p, h, b: net.inner(p, h, *b)[0], lambda p, h, b: net.outer(p, h, b, steps[-1])
        )
        batches = [(train, aux) for aux in steps[:-1]]
        expected = hg.hypergradient(written, net.params, net.hparams, batches, net.val, estimator)
        found = net.estimate(estimator, train=train).hypergradient
        assert relative(net.flat(found), net.flat(expected)) <= rounding(estimator)


class TestItIsCarried:
    @pytest.mark.parametrize(
        "estimator",
        [GREEDY, hg.Greedy(RULE, response="gradient"), DIFFERENCED, *UNROLLED, TRUNCATED],
        ids=named,
    )
    def test_as_by_a_loop_written_by_hand(self, net, estimator):
        state = None
        for _ in range(8 // estimator.training_steps):
            state = net.estimate(estimator, state).state
        params, _, aux = net.trained(8)
        close(net.backend, (state.params, state.aux), (params, aux), 1e-12)
        assert int(state.aux["count"]) == 11 and net.backend.describe(state.aux["count"]).kind == "int"

    def test_without_lookahead_the_outer_loss_takes_that_of_its_parameters(self, net):
        out = net.estimate(hg.Greedy(RULE, lookahead=False))
        expected = net.outer(net.params, net.hparams, net.val, net.aux)
        close(net.backend, (out.outer_value, out.state.aux), (expected, net.trained(1)[2]), 1e-12)

    @pytest.mark.parametrize("estimator", [GREEDY, UNROLLED[1], IMPLICIT], ids=named)
    def test_and_is_empty_for_losses_without(self, backend, estimator):
        problem, params, hparams, train, val = regression(backend)
        estimate = backend.compile(
            lambda state: estimator.estimate(problem, state, hparams, lambda t: train, val)
        )
        state = estimator.init(problem, params, hparams)
        assert state.aux is None is estimate(state).state.aux

    @pytest.mark.parametrize("estimator", [GREEDY, DIFFERENCED, UNROLLED[1]], ids=named)
    def test_and_the_one_given_stays_even_if_the_loss_writes_into_it(self, net, estimator):
        def inner(params, hparams, batch, aux):
            loss, new = net.inner(params, hparams, batch, aux)
            aux.update(new)
            return loss, aux

        given, expected = dict(net.aux), net.flat(net.estimate(estimator).hypergradient)
        found = net.attempt(hg.Bilevel(inner, net.outer, has_aux=True), estimator, aux=given)
        close(net.backend, given, net.aux, 0.0)
        assert relative(found, expected) <= rounding(estimator)


class TestTuner:
    @pytest.mark.parametrize(
        "estimator, every, options",
        [
            (GREEDY, 1, {}),
            (GREEDY, 5, {}),
            (UNROLLED[1], 5, {}),
            (IMPLICIT, 5, {"update": RULE}),
        ],
        ids=named,
    )
    def test_trains_as_a_loop_written_by_hand(self, net, estimator, every, options):
        run = net.run(hg.Tuner(net.problem, estimator, hyper_update=FROZEN, every=every, **options), 12)
        steps = len(run.history.inner_values)  # an unroll that is begun is finished
        assert int(run.state.inner.aux["count"]) == 3 + steps
        params, _, aux = net.trained(steps)
        close(net.backend, (run.params, run.state.inner.aux), (params, aux), 1e-12)

    def test_restarts_with_the_state_of_the_start(self, net):
        tuner = hg.Tuner(net.problem, GREEDY, hyper_update=FROZEN, every=1, restart=True)
        close(net.backend, net.run(tuner, 3).state.inner.aux, net.trained(1)[2], 1e-12)

    def test_resumes_bit_for_bit(self, net, tmp_path):
        tuner = hg.Tuner(net.problem, GREEDY, every=3)

        def run(steps, **options):  # step by step: a part of a run would be another program than the whole
            given = net.params, net.hparams, iter([net.train] * 6), net.val, steps
            return tuner.run(*given, aux=net.aux, **options)

        tuner.save(tmp_path / "run.npz", run(4))
        half = tuner.load(tmp_path / "run.npz", net.params, net.hparams, aux=net.aux)
        assert int(half[0].inner.aux["count"]) == 7
        resumed, whole = run(6, resume=half), run(6)
        close(net.backend, (resumed.params, resumed.hparams), (whole.params, whole.hparams), 0.0)
        close(net.backend, resumed.state.inner.aux, whole.state.inner.aux, 0.0)


class TestWhatDoesNotFit:
    @pytest.mark.parametrize("estimator", [GREEDY, DIFFERENCED, *UNROLLED, IMPLICIT], ids=named)
    def test_a_loss_without_the_next_state(self, net, estimator):
        problem = hg.Bilevel(lambda *given: net.inner(*given)[0], net.outer, has_aux=True)
        with pytest.raises(ArgumentError, match=r"has_aux=True it returns \(loss, aux\)"):
            net.attempt(problem, estimator)

    @pytest.mark.parametrize("estimator", [GREEDY, DIFFERENCED, *UNROLLED], ids=named)
    @pytest.mark.parametrize(
        "change, path",
        [
            (lambda aux: aux | {"more": aux["count"]}, r"aux\['more'\]"),
            (lambda aux: {"norm": aux["norm"]}, r"aux\['count'\]"),
            (lambda aux: aux | {"norm": (aux["norm"][0], aux["norm"][1][:1])}, r"aux\['norm'\]\[1\]"),
        ],
        ids=["more", "less", "shape"],
    )
    def test_a_state_of_another_kind(self, net, estimator, change, path):
        def inner(*given):
            loss, aux = net.inner(*given)
            return loss, change(aux)

        with pytest.raises(ArgumentError, match=path):
            net.attempt(hg.Bilevel(inner, net.outer, has_aux=True), estimator)

    def test_losses_that_return_a_state_and_did_not_say_so(self, net):
        undeclared = hg.Bilevel(lambda p, h, b: net.inner(p, h, b, net.aux), net.outer)
        with pytest.raises(ArgumentError, match="returned tuple"):
            net.attempt(undeclared, GREEDY, aux=None)
        with pytest.raises(ArgumentError, match="aux= is given"):
            net.attempt(undeclared, GREEDY)

    def test_a_state_that_is_not_given(self, net):
        with pytest.raises(ArgumentError, match="pass its initial value as aux="):
            net.attempt(hg.Bilevel(net.inner, net.outer, has_aux=True), GREEDY, aux=None)


@on_torch
@pytest.mark.parametrize(
    "estimator",
    [hg.Greedy(hg.SGD(0.1)), hg.Forward(hg.SGD(0.1), 3)]
    + [
        hg.Unrolled(hg.SGD(0.1, momentum=0.5), 3, tape=tape)
        for tape in (hg.Full(), hg.States(), hg.Reversible())
    ],
    ids=repr,
)
def test_a_state_that_a_loss_writes_to_is_its_own(backend, estimator):
    def inner(params, hparams, batch, aux, *, in_place):
        if in_place:
            aux["mean"].mul_(0.5).add_(params.detach())
        else:
            aux = {"mean": 0.5 * aux["mean"] + params.detach()}
        return ((params - 1) ** 2 * hparams * aux["mean"]).sum(), aux

    def outer(params, hparams, batch, aux):
        return (params**2).sum() + aux["mean"].sum()

    params, hparams = backend.asarray(np.array([0.5, 2.0])), backend.asarray(np.array([0.3, 0.2]))
    found = []
    for in_place in (False, True, True):
        problem = hg.Bilevel(partial(inner, in_place=in_place), outer, has_aux=True)
        aux = {"mean": backend.asarray(np.ones(2))}
        state = estimator.init(problem, params, hparams, aux=aux)
        for _ in range(2):  # the same state gives the same estimate again
            out = estimator.estimate(problem, state, hparams, lambda t: None, None)
            found.append(backend.to_numpy(out.hypergradient))
        assert aux["mean"].tolist() == [1.0, 1.0]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
