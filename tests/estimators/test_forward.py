"""Forward mode: the tangents that are carried along give what the way back gives, at any moment."""

import numpy as np
import pytest
from support.forward import HEAVY, RULES, T, fit, flat, full, net, program, start
from support.frameworks import affordable, dear, each_backend, on_jax
from support.runs import estimate, same

import hypergrad as hg

parametrize = pytest.mark.parametrize


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
