"""Forward mode in the tuner, with noise and statistics, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from support.forward import HEAVY, ROWS, SIZE, STEADY, T, fit, flat, net, program
from support.frameworks import NUMPY, each_backend, with_a_generator
from support.noise import normal
from support.runs import agree, estimate, same

import hypergrad as hg
from hypergrad.errors import ArgumentError, DisconnectedError, NonFiniteError

parametrize = pytest.mark.parametrize


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


class TestManners:
    @with_a_generator
    @parametrize("directions", [None, SIZE])
    def test_noise_of_the_generator(self, backend, directions):
        p = net(backend)

        def inner(params, hparams, batch):
            noise = batch["noise"] if "noise" in batch else normal(backend, ROWS, 2)
            return p.problem.inner(params, hparams, batch | {"x": batch["x"] + hparams["gain"] * noise})

        noisy = p._replace(problem=hg.Bilevel(inner, p.problem.outer))
        backend.random.restore(backend.random.state(seed=3))
        noise = [normal(backend, ROWS, 2) for _ in range(T)]
        after = repr(backend.random.state())
        held = noisy._replace(train=lambda t: p.train(t) | {"noise": noise[t]})
        expected = estimate(backend, held, hg.Unrolled(HEAVY, T, allow_unused=True))
        backend.random.restore(backend.random.state(seed=3))
        found = estimate(backend, noisy, fit(HEAVY, T, directions))
        assert repr(backend.random.state()) == after
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
