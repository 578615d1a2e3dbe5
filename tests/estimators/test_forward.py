"""Forward mode: the tangents that are carried along give what the way back gives, at any moment."""

import dataclasses
from collections import namedtuple
from functools import cache, partial

import autograd
import numpy as np
import optree
import pytest
from support import frameworks
from support.frameworks import BACKENDS, NUMPY, affordable, dear, each_backend, on_jax, with_a_generator

import hypergrad as hg
from hypergrad.errors import ArgumentError, DisconnectedError, NonFiniteError

parametrize = pytest.mark.parametrize
T, ROWS = 10, 6

rate, inertia = (hg.Schedule(lambda h, t, name=name: h[name][t]) for name in ("lr", "momentum"))
HEAVY = hg.SGD(rate, momentum=inertia)
RULES = {
    "sgd": HEAVY,
    "adam": hg.Adam(rate, beta1=inertia, eps=0.1, weight_decay=lambda h: h["gain"]),
    "rmsprop": hg.RMSprop(rate, momentum=inertia, eps=0.1),
}


def start(hparams):
    """θ_0 as a function of the hyperparameters."""
    return {"w": hparams["gain"] * hparams["start"], "v": hparams["start"][0] ** 3}


class Net(namedtuple("Net", "problem params hparams train val")):
    @property
    def arguments(self):
        return self.problem, self.params, self.hparams


def net(backend, shifts=(0.0,) * (T + 1), dtype=float):
    """A small net with weights for the examples, a gain to learn, and a rate for each step.

    ``shifts`` move the penalty of each step, and in the end that of the judgement.
    """
    xp, rng = backend.xp, np.random.default_rng(0)

    def strength(hparams, batch):
        return xp.exp(hparams["log_l2"] + batch["shift"])

    def residual(params, hparams, batch):
        return xp.tanh(hparams["gain"] * batch["x"] @ params["w"]) @ params["v"] - batch["y"]

    def inner(params, hparams, batch):
        squares = hparams["weights"] * residual(params, hparams, batch) ** 2
        return xp.mean(squares) + strength(hparams, batch) * xp.sum(params["w"] ** 2)

    def outer(params, hparams, batch):
        return xp.mean(residual(params, hparams, batch) ** 2) + 0.1 * strength(hparams, batch)

    x, y = rng.normal(size=(T + 1, ROWS, 2)), rng.normal(size=(T + 1, ROWS))
    data = {"x": x, "y": y, "shift": np.array(shifts)}
    theta = {"w": rng.normal(size=(2, 3)), "v": rng.normal(size=3)}
    lam = {
        "lr": rng.uniform(0.03, 0.1, T),
        "momentum": rng.uniform(0.3, 0.9, T),
        "log_l2": np.array(-2.5),
        "gain": np.array(0.8),
        "weights": rng.uniform(0.5, 1.5, ROWS),
        "start": rng.normal(size=(2, 3)),
    }
    cast = lambda leaf: backend.asarray(leaf.astype(dtype))  # noqa: E731
    theta, lam, data = optree.tree_map(cast, (theta, lam, data))
    train = lambda t: backend.map(lambda leaf: leaf[t], data)  # noqa: E731
    return Net(hg.Bilevel(inner, outer), theta, lam, train, train(T))


def flat(backend, tree):
    return np.concatenate([np.ravel(backend.to_numpy(leaf)) for leaf in backend.flatten(tree)[0]])


def estimate(backend, p, estimator, state=None, **changes):
    p = p._replace(**changes)
    state = estimator.init(*p.arguments) if state is None else state
    batches = {"train": p.train, "val": p.val}
    return frameworks.estimate(backend, estimator, p.problem, state, p.hparams, compiled=True, **batches)


def agree(backend, mine, other, tolerance=1e-12):
    """Leaf by leaf, so that a large one hides no small one."""
    assert backend.paths(mine, "") == backend.paths(other, "")
    pairs = zip(*(backend.flatten(tree)[0] for tree in (mine, other)), strict=True)
    for path, (x, y) in zip(backend.paths(mine, ""), pairs, strict=True):
        x, y = backend.to_numpy(x), backend.to_numpy(y)
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), path


def same(backend, mine, other):
    """Two estimates of one run."""
    agree(backend, mine.hypergradient, other.hypergradient)
    for of in (lambda out: (out.state.params, out.state.opt_state), lambda out: out.outer_value):
        agree(backend, of(mine), of(other))
    assert int(mine.state.step) == int(other.state.step)


fit = partial(hg.Forward, allow_unused=True)  # λ holds a start, which not every run uses


def program(backend, p, estimator):
    """Estimates from a state, one program for all of them."""
    of = lambda state, hparams: estimator.estimate(p.problem, state, hparams, p.train, p.val)  # noqa: E731
    return frameworks.program(backend, of)


@cache
def full(name, rule="sgd", steps=T, with_start=False):
    """What the way back gives, compiled once."""
    begin = start if with_start else None
    unrolled = hg.Unrolled(RULES[rule], steps, start=begin, allow_unused=True)
    return estimate(BACKENDS[name], net(BACKENDS[name]), unrolled)


@each_backend
class TestAgainstUnrolled:
    @parametrize("rule", ["sgd", dear("adam"), dear("rmsprop")])
    def test_all_terms(self, backend, rule):
        same(backend, estimate(backend, net(backend), fit(RULES[rule], T)), full(backend.name, rule))

    def test_a_start(self, backend):
        found = estimate(backend, net(backend), hg.Forward(HEAVY, T, start=start))
        same(backend, found, full(backend.name, with_start=True))

    def test_a_start_is_where_every_estimate_begins(self, backend):
        p = net(backend)
        steady = hg.SGD(lambda h: h["lr"][0], momentum=lambda h: h["momentum"][0])
        run = program(backend, p._replace(train=lambda t: p.train(t % 4)), fit(steady, 4, start=start))
        first = run(fit(steady, 4, start=start).init(*p.arguments), p.hparams)
        again = run(first.state, p.hparams)
        assert int(again.state.step) == 8
        same(backend, again._replace(state=again.state._replace(step=4)), first)

    def test_differences_of_real_training(self, backend):
        p = net(backend)
        hparams = {name: leaf for name, leaf in p.hparams.items() if name != "start"}
        at = (p.problem, p.params, hparams, p.train, p.val, hg.Forward(HEAVY, T))
        check = hg.check_hypergradient(*at, directions=affordable(backend, 3, 1))
        assert max(check.relative_error, check.difference_error) <= 1e-6
        assert check.exact_relative_error <= 1e-12

    def test_float32(self, backend):
        out = estimate(backend, net(backend, dtype=np.float32), fit(HEAVY, T))
        leaves = backend.flatten((out.hypergradient, out.state.params, out.state.opt_state))[0]
        assert {backend.describe(leaf).dtype for leaf in leaves} == {"float32"}
        found, expected = (flat(backend, x.hypergradient) for x in (out, full(backend.name)))
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@each_backend
class TestRealTime:  # the past is carried in the state
    def test_two_halves_are_one_whole(self, backend):
        p = net(backend)
        run = program(backend, p, fit(HEAVY, T // 2))
        first = run(fit(HEAVY, T // 2).init(*p.arguments), p.hparams)
        same(backend, first, full(backend.name, steps=T // 2))
        same(backend, run(first.state, p.hparams), full(backend.name))

    def test_step_by_step(self, backend):
        p, forward = net(backend), fit(RULES["rmsprop"], 1)
        run, state = program(backend, p, forward), forward.init(*p.arguments)
        for _ in range(T):
            out = run(state, p.hparams)
            assert backend.paths(out.state, "") == backend.paths(state, "")
            state = out.state
        same(backend, out, full(backend.name, "rmsprop"))

    def test_hyperparameters_that_move(self, backend):
        # As one run in which the hyperparameters are λ at first, and λ + δ from the middle on.
        p, moved, half = net(backend), 0.7, T // 2
        run = program(backend, p, fit(HEAVY, half))
        first = run(fit(HEAVY, half).init(*p.arguments), p.hparams)
        found = run(first.state, p.hparams | {"log_l2": p.hparams["log_l2"] + moved})
        shifted = net(backend, shifts=[0.0] * half + [moved] * (T - half + 1))
        same(backend, found, estimate(backend, shifted, hg.Unrolled(HEAVY, T, allow_unused=True)))

    def test_unrolled_forgets_it(self, backend):
        p, half = net(backend), T // 2
        warm = full(backend.name, steps=half).state
        short = estimate(backend, p, hg.Unrolled(HEAVY, half, allow_unused=True), warm).hypergradient
        x, y = flat(backend, short), flat(backend, full(backend.name).hypergradient)
        assert np.linalg.norm(x - y) > 1e-3 * np.linalg.norm(y)

    def test_memory_is_flat(self, backend):
        p = net(backend)
        sizes = [
            sum(backend.to_numpy(leaf).nbytes for leaf in backend.flatten(out.state.memory)[0])
            for out in (estimate(backend, p, fit(HEAVY, steps)) for steps in (2, T))
        ]
        assert sizes[0] == sizes[1] > 0


def direct(backend, out):
    """∂_λ C2 where training ended, by autograd, as one vector."""
    p = net(NUMPY)
    params = backend.map(backend.to_numpy, out.state.params)
    value = lambda lam: p.problem.outer(params, lam, p.val)  # noqa: E731
    return flat(NUMPY, autograd.grad(value)(p.hparams))


SIZE = 2 * T + 2 + ROWS + 6  # hyperparameters


class TestDirections:
    @each_backend
    @parametrize("count", [dear(SIZE), SIZE + 3])
    def test_all_of_them_are_exact(self, backend, count):
        found = estimate(backend, net(backend), fit(HEAVY, T, directions=count))
        same(backend, found, full(backend.name))

    @each_backend
    def test_of_a_start(self, backend):
        found = estimate(backend, net(backend), hg.Forward(HEAVY, T, directions=SIZE, start=start))
        same(backend, found, full(backend.name, with_start=True))

    @each_backend
    @parametrize("count", [dear(1), 4, dear(SIZE - 1)])
    def test_project_the_response_and_leave_the_direct_term(self, backend, count):
        # r̂ = (n/b) P r with a projection P of rank b, so r̂·r = (b/n) ‖r̂‖².
        out = estimate(backend, net(backend), fit(HEAVY, T, directions=count))
        agree(backend, out.state.params, full(backend.name).state.params)
        exact = flat(backend, full(backend.name).hypergradient) - direct(backend, out)
        found = flat(backend, out.hypergradient) - direct(backend, out)
        assert found @ exact == pytest.approx(count / SIZE * (found @ found), rel=1e-10)
        assert np.linalg.norm(found - exact) > 1e-3 * np.linalg.norm(exact)

    def test_are_unbiased(self):
        rng = np.random.default_rng(1)
        x, y, z = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
        inner = lambda w, h, b: ((x @ w - y) ** 2).mean() + (h["l2"] ** 2 * w**2).sum() + h["tilt"] * w.sum()  # noqa: E731
        problem = hg.Bilevel(inner, lambda w, h, b: ((w - z) ** 2).sum())
        lam = {"l2": np.array([0.5, -0.4, 0.7]), "tilt": np.array(0.3)}
        at = (problem, np.zeros(3), lam, lambda t: None, None)
        of = lambda estimator: flat(NUMPY, hg.hypergradient(*at, estimator))  # noqa: E731
        rule, steps, seeds = hg.SGD(0.2, momentum=0.5), 3, 400
        drawn = np.array([of(hg.Forward(rule, steps, 1, seed)) for seed in range(seeds)])
        error = drawn.mean(0) - of(hg.Unrolled(rule, steps))
        assert np.all(np.abs(error) <= 4 * drawn.std(0, ddof=1) / seeds**0.5)
        assert np.linalg.norm(drawn.std(0)) > 0.1 * np.linalg.norm(drawn.mean(0))

    @each_backend
    def test_are_drawn_anew_at_every_estimate(self, backend):
        p, forward = net(backend), fit(HEAVY, T // 2, directions=1)
        run = program(backend, p, forward)
        state = forward.init(*p.arguments)
        first, again = run(state, p.hparams), run(state, p.hparams)
        agree(backend, first.hypergradient, again.hypergradient, 0.0)
        later = run(first.state, p.hparams)
        x, y = (flat(backend, out.hypergradient) - direct(backend, out) for out in (first, later))
        assert abs(x @ y) < 0.99 * np.linalg.norm(x) * np.linalg.norm(y)

    def test_differ_with_the_seed(self):
        found = [
            flat(NUMPY, estimate(NUMPY, net(NUMPY), fit(HEAVY, T, 2, seed)).hypergradient) for seed in (0, 1)
        ]
        assert not np.allclose(*found)

    def test_leave_the_generator_alone(self):
        before = repr(NUMPY.generator())
        estimate(NUMPY, net(NUMPY), fit(HEAVY, T, directions=2))
        assert repr(NUMPY.generator()) == before

    @each_backend
    def test_begin_anew_at_every_estimate(self, backend):
        p, half = net(backend), T // 2
        warm = full(backend.name, steps=half).state
        forward = fit(HEAVY, half, directions=SIZE)
        run = program(backend, p, forward)
        second = run(run(forward.init(*p.arguments), p.hparams).state, p.hparams)
        same(backend, second, estimate(backend, p, hg.Unrolled(HEAVY, half, allow_unused=True), warm))


STEADY = hg.SGD(0.1, momentum=0.5)


class TestInTheTuner:
    @staticmethod
    def tuner(p, forward, **options):
        return hg.Tuner(p.problem, forward, hyper_update=hg.SGD(0.05), every=2, **options)

    @each_backend
    @parametrize("forward", [fit(STEADY, 2), fit(STEADY, 2, directions=3)], ids=["exact", "directions"])
    def test_moves_along_its_estimates(self, backend, forward):
        p = net(backend)
        run = self.tuner(p, forward).run(p.params, p.hparams, p.train, p.val, 6)
        step, state, hparams = program(backend, p, forward), forward.init(*p.arguments), p.hparams
        for _ in range(3):
            out = step(state, hparams)
            state, hparams = out.state, backend.axpy(-0.05, out.hypergradient, hparams)
        agree(backend, run.hparams, hparams, 1e-10)
        agree(backend, run.params, state.params, 1e-10)
        assert np.all(run.history.outer_values[-1] == pytest.approx(float(out.outer_value), rel=1e-10))

    def test_uses_the_whole_past(self):
        p = net(NUMPY)
        real, short = (
            self.tuner(p, e).run(p.params, p.hparams, p.train, p.val, 6).hparams
            for e in (fit(STEADY, 2), hg.Unrolled(STEADY, 2, allow_unused=True))
        )
        assert not np.allclose(flat(NUMPY, real), flat(NUMPY, short), rtol=1e-4)

    def test_forgets_no_step_between_its_estimates(self):
        p = net(NUMPY)
        try:
            tuner = hg.Tuner(p.problem, fit(STEADY, 1), every=3)
        except ArgumentError:
            return  # refused is right, too
        found = tuner.run(p.params, p.hparams, p.train, p.val, 3).last.estimate
        agree(
            NUMPY,
            found.hypergradient,
            estimate(NUMPY, p, hg.Unrolled(STEADY, 3, allow_unused=True)).hypergradient,
        )

    @parametrize("forward", [fit(STEADY, 2), fit(STEADY, 2, directions=3)], ids=["exact", "directions"])
    def test_resumes(self, forward, tmp_path):
        p = net(NUMPY)
        tuner, at = self.tuner(p, forward), (p.params, p.hparams, p.train, p.val)
        whole = tuner.run(*at, 6)
        tuner.save(tmp_path / "run.npz", tuner.run(*at, 4))
        rest = tuner.run(*at, 6, resume=tuner.load(tmp_path / "run.npz", p.params, p.hparams))
        agree(NUMPY, (rest.hparams, rest.params), (whole.hparams, whole.params), 0.0)


@on_jax
class TestPrograms:
    def test_map_over_hyperparameters(self, backend):
        import jax

        p, forward = net(backend), hg.Forward(HEAVY, T, start=start)
        many = jax.tree.map(lambda leaf: jax.numpy.stack([leaf, 1.1 * leaf]), p.hparams)
        state = forward.init(*p.arguments)
        mapped = jax.jit(jax.vmap(lambda h: forward.estimate(p.problem, state, h, p.train, p.val)))(many)
        first = jax.tree.map(lambda leaf: leaf[0], mapped)
        same(backend, first, full("jax", with_start=True))

    @parametrize("directions", [None, 2])
    def test_are_as_long_for_many_steps_as_for_few(self, backend, directions):
        import jax

        def lines(steps):
            p, forward = net(backend), fit(HEAVY, steps, directions)
            of = lambda s, h: forward.estimate(p.problem, s, h, p.train, p.val)  # noqa: E731
            return len(str(jax.make_jaxpr(of)(forward.init(*p.arguments), p.hparams)).splitlines())

        assert abs(lines(200) - lines(20)) <= 5


class TestManners:
    @with_a_generator
    @parametrize("directions", [None, SIZE])
    def test_noise_of_the_generator(self, backend, directions):
        p = net(backend)

        def normal():
            if backend.name == "torch":
                import torch

                return torch.randn((ROWS, 2), dtype=torch.float64)
            return np.random.normal(size=(ROWS, 2))

        def inner(params, hparams, batch):
            noise = batch["noise"] if "noise" in batch else normal()
            return p.problem.inner(params, hparams, batch | {"x": batch["x"] + hparams["gain"] * noise})

        noisy = p._replace(problem=hg.Bilevel(inner, p.problem.outer))
        backend.restore(backend.generator(seed=3))
        noise = [normal() for _ in range(T)]
        after = repr(backend.generator())
        held = noisy._replace(train=lambda t: p.train(t) | {"noise": noise[t]})
        expected = estimate(backend, held, hg.Unrolled(HEAVY, T, allow_unused=True))
        backend.restore(backend.generator(seed=3))
        found = estimate(backend, noisy, fit(HEAVY, T, directions))
        assert repr(backend.generator()) == after
        same(backend, found, expected)

    @each_backend
    def test_statistics(self, backend):
        p, xp = net(backend), backend.xp

        def inner(params, hparams, batch, aux):
            mean = 0.8 * aux + 0.2 * xp.mean(batch["x"], axis=0)
            return p.problem.inner(params, hparams, batch | {"x": batch["x"] - mean}), mean

        outer = lambda t, h, b, aux: p.problem.outer(t, h, b | {"x": b["x"] - aux})  # noqa: E731
        problem, aux = hg.Bilevel(inner, outer, has_aux=True), backend.asarray(np.zeros(2))

        def of(estimator):
            state = estimator.init(problem, p.params, p.hparams, aux=aux)
            return estimate(backend, p, estimator, state, problem=problem)

        found, expected = of(fit(HEAVY, T)), of(hg.Unrolled(HEAVY, T, allow_unused=True))
        same(backend, found, expected)
        agree(backend, found.state.aux, expected.state.aux)

    @each_backend
    @parametrize("directions", [None, 2])
    def test_a_hyperparameter_that_nothing_uses(self, backend, directions):
        with pytest.raises(DisconnectedError) as caught:
            estimate(backend, net(backend), hg.Forward(HEAVY, T, directions))
        assert caught.value.path == "hparams['start']"

    @each_backend
    def test_a_loss_that_is_not_finite(self, backend):
        p = net(backend)
        spoilt = lambda t: p.train(t) | {"y": p.train(t)["y"] + backend.xp.log(1.0 * bad[t])}  # noqa: E731
        bad = backend.asarray(np.where(np.arange(T + 1) == 3, -1.0, 1.0))
        with np.errstate(all="ignore"), pytest.raises(NonFiniteError) as caught:
            estimate(backend, p, fit(HEAVY, T), train=spoilt)
        assert (caught.value.where, caught.value.step) == ("T1", 3)

    @each_backend
    def test_what_is_given_is_left_as_it_was(self, backend):
        p, forward = net(backend), fit(HEAVY, 3)
        state = forward.init(*p.arguments)
        bits = lambda: [backend.to_numpy(x).tobytes() for x in backend.flatten((p[1:3], state[:2]))[0]]  # noqa: E731
        given = bits()
        warm = estimate(backend, p, forward, state).state
        first, again = (estimate(backend, p, forward, warm) for _ in range(2))
        assert bits() == given
        agree(backend, first.hypergradient, again.hypergradient, 0.0)


class TestValues:
    def test_are_frozen_comparable_and_printable(self):
        value = hg.Forward(HEAVY, 3, directions=2)
        assert (
            value == dataclasses.replace(value)
            and value != hg.Forward(HEAVY, 3)
            and value.training_steps == 3
        )
        assert "Forward" in repr(value)
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)

    NONSENSE = {
        "an update that is none": lambda: hg.Forward("sgd", 3),
        "no steps": lambda: hg.Forward(HEAVY, 0),
        "half a step": lambda: hg.Forward(HEAVY, 1.5),
        "no directions": lambda: hg.Forward(HEAVY, 3, directions=0),
        "half a direction": lambda: hg.Forward(HEAVY, 3, directions=0.5),
        "a start that is none": lambda: hg.Forward(HEAVY, 3, start=1.0),
        "half a seed": lambda: hg.Forward(HEAVY, 3, directions=1, seed=0.5),
    }

    @parametrize("build", NONSENSE.values(), ids=NONSENSE)
    def test_refuse_nonsense(self, build):
        with pytest.raises(ArgumentError):
            build()
