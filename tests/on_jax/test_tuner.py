"""A run of the tuner in JAX: one program for all of its steps, for many starts, for your own loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import errors
from hypergrad.backend import get_backend
from hypergrad.testing.problems import close, regression

JAX, NUMPY = get_backend("jax"), get_backend("numpy")
RULE = hg.SGD(0.02, momentum=0.9)
ANYWHERE = {"checks": hg.Checks(away="ignore")}
KINDS = {
    "greedy": (hg.Greedy(RULE), {}),
    "unrolled": (hg.Unrolled(hg.Adam(0.01), 3, tape=hg.States()), {}),
    "restarted": (hg.Unrolled(RULE, 5), {"restart": True}),
    "implicit": (hg.Implicit(hg.Damped(hg.CG(), 3.0), **ANYWHERE), {"update": RULE}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Counted:
    """The regression problem of a backend, and how often its training loss was traced or run."""

    def __init__(self, backend=JAX):
        self.problem, self.params, self.hparams, self.train, self.val = regression(backend)
        self.traces = 0

    def inner(self, *args):
        self.traces += 1
        return self.problem.inner(*args)

    def tuner(self, kind="greedy", every=5, **options):
        estimator, needed = KINDS[kind]
        problem = hg.Bilevel(self.inner, self.problem.outer)
        return hg.Tuner(problem, estimator, every=every, **needed, **options)

    def run(self, tuner, steps, train=None, **options):
        given = self.train if train is None else train
        return tuner.run(self.params, options.pop("hparams", self.hparams), given, self.val, steps, **options)


def numpy_run(kind, steps):
    there = Counted(NUMPY)
    return there.run(there.tuner(kind), steps)


def same_history(mine, other, rtol=1e-9):
    columns, expected = mine.arrays(), other.arrays()
    assert columns.keys() == expected.keys()
    for name in set(columns) - {"report:bytes_held"}:  # the graphs of two frameworks differ in size
        np.testing.assert_allclose(columns[name], expected[name], rtol, 1e-12, err_msg=name)


class TestRun:
    @each_kind
    def test_it_is_the_run_of_numpy(self, kind):
        here, there = Counted(), numpy_run(kind, 33)
        mine = here.run(here.tuner(kind), 33)
        same_history(mine.history, there.history)
        assert int(mine.state.since) == there.state.since and int(mine.state.updates) == there.state.updates
        for leaf, other in zip(jax.tree.leaves(mine.params), NUMPY.flatten(there.params)[0], strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-9)

    @each_kind
    def test_a_thousand_steps_are_traced_as_often_as_fifteen(self, kind):
        traces = []
        for steps in (15, 1000):
            here = Counted()
            here.run(here.tuner(kind), steps)
            traces.append(here.traces)
        assert traces[0] == traces[1] <= 4

    def test_the_same_run_from_other_values_is_not_compiled_again(self):
        here = Counted()
        tuner = here.tuner()
        here.run(tuner, 20)
        traced = here.traces
        moved = jax.tree.map(lambda x: x + 0.5, here.hparams)
        other = here.run(tuner, 20, hparams=moved)
        here.run(tuner, 20, train=jax.tree.map(lambda x: 2.0 * x, here.train))
        assert here.traces == traced
        assert not np.allclose(other.hparams["log_l2"], moved["log_l2"])

    def test_the_history_is_in_arrays(self):
        here = Counted()
        history = here.run(here.tuner(), 23).history
        assert all(isinstance(column, np.ndarray) for column in history.arrays().values())
        assert history.steps.tolist() == [0, 5, 10, 15, 20] and history.inner_values.shape == (23,)
        assert history.values["hparams['log_l2']"].shape == (5, 2)

    def test_lists_functions_and_iterators_of_batches_agree(self):
        here = Counted()
        batches = [jax.tree.map(lambda x, k=k: x * (1 + 0.1 * k), here.train) for k in range(4)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        ways = [
            batches,
            lambda t: jax.tree.map(lambda x: x[t % 4], stacked),
            iter(batches * 6),
        ]
        runs = [here.run(here.tuner(), 23, train=train) for train in ways]
        for other in runs[1:]:
            same_history(other.history, runs[0].history, 1e-12)
            close(JAX, other.params, runs[0].params, 1e-12)

    def test_from_an_iterator_both_kinds_of_steps_are_compiled_once(self):
        here = Counted()
        here.run(here.tuner(), 40, train=iter([here.train] * 40))
        assert here.traces == 2
        with pytest.raises(errors.ArgumentError, match="T1"):
            here.run(here.tuner(), 40, train=iter([here.train] * 3))

    def test_batches_of_several_shapes_are_refused(self):
        here = Counted()
        odd = jax.tree.map(lambda x: x[:3], here.train)
        with pytest.raises(errors.ArgumentError, match="structure or shape"):
            here.run(here.tuner(), 10, train=[here.train, odd])

    def test_resumed_in_the_middle_of_a_round(self, tmp_path):
        here = Counted()
        tuner = here.tuner()
        whole, half = here.run(tuner, 30), here.run(tuner, 13)
        tuner.save(tmp_path / "half.npz", half)
        resumed = here.run(tuner, 30, resume=tuner.load(tmp_path / "half.npz", here.params, here.hparams))
        same_history(resumed.history, whole.history, 1e-13)
        close(JAX, (resumed.params, resumed.hparams), (whole.params, whole.hparams), 1e-13)

    def test_progress_is_told_from_inside(self, capsys):
        here = Counted()
        here.run(here.tuner(), 10, progress=True)
        jax.effects_barrier()

    def test_a_fault_ends_it_where_it_is_met(self):
        here, late = Counted(), []

        def train(t):
            jax.debug.callback(lambda t: late.append(int(t)), t)
            return here.train | {"y": jnp.where(t == 12, jnp.nan, 1.0) * here.train["y"]}

        with pytest.raises(errors.NonFiniteError) as caught:
            here.run(here.tuner(), 10_000, train=train)
        jax.effects_barrier()
        assert (caught.value.where, caught.value.step) == ("T1", 12) and max(late) < 20

    def test_a_failed_solve_ends_it_too(self):
        here = Counted()
        tuner = hg.Tuner(here.problem, hg.Implicit(hg.CG(max_steps=1), **ANYWHERE), every=5, update=RULE)
        with pytest.raises(errors.SolveError) as caught:
            here.run(tuner, 1000)
        assert caught.value.reason == "max_steps" and caught.value.step == 1


class TestStep:
    @each_kind
    def test_step_by_step_it_is_the_run(self, kind):
        here = Counted()
        tuner = here.tuner(kind)
        whole, state = here.run(tuner, 20), tuner.init(here.params, here.hparams)
        here.traces, done = 0, 0
        while done < 20:
            state, now = tuner.step(state, lambda t: here.train, here.val)
            done += now.trained
        assert here.traces <= 3
        close(JAX, (state.inner.params, tuner.hparams(state)), (whole.params, whole.hparams), 1e-12)

    @each_kind
    def test_one_program_of_yours_holds_both_kinds_and_is_compiled_once(self, kind):
        here = Counted()
        tuner = here.tuner(kind)
        step = jax.jit(lambda state, train, val: tuner.step(state, lambda t: train, val))
        state, traces, updates = tuner.init(here.params, here.hparams), [], 0
        alone = state
        for _ in range(12):
            state, done = step(state, here.train, here.val)
            tuner.check(state, done)
            traces.append(here.traces)
            updates += bool(done.updated)
        traced = here.traces
        for _ in range(12):
            alone, _ = tuner.step(alone, lambda t: here.train, here.val)
        assert set(traces) == {traced} and updates == int(state.updates) == alone.updates
        close(JAX, (state.inner.params, state.free), (alone.inner.params, alone.free), 1e-12)

    def test_it_scans(self):
        here = Counted()
        tuner = here.tuner()
        start = jax.tree.map(jnp.asarray, tuner.init(here.params, here.hparams))
        end, done = jax.lax.scan(lambda s, _: tuner.step(s, here.train, here.val), start, None, 20)
        whole = here.run(tuner, 20)
        close(JAX, (end.inner.params, tuner.hparams(end)), (whole.params, whole.hparams), 1e-12)
        assert done.updated.tolist() == 4 * [False, False, False, False, True]
        np.testing.assert_allclose(done.inner_value, whole.history.inner_values, rtol=1e-12)

    def test_a_fault_is_raised_by_check_and_leaves_the_hyperparameters(self):
        here = Counted()
        tuner = here.tuner(every=1, hyper_update=hg.Adam(0.1))
        step, start = jax.jit(tuner.step), tuner.init(here.params, here.hparams)
        spoilt = here.train | {"y": here.train["y"] * jnp.nan}
        state, done = step(start, spoilt, here.val)
        close(JAX, (state.free, state.hyper_state), (start.free, start.hyper_state), 0.0)
        with pytest.raises(errors.NonFiniteError) as caught:
            tuner.check(state, done)
        assert caught.value.where == "T1"
        with pytest.raises(errors.NonFiniteError):
            tuner.step(start, spoilt, here.val)

    def test_an_iterator_inside_of_a_program_is_refused(self):
        here = Counted()
        tuner = here.tuner()
        with pytest.raises(errors.ArgumentError, match="iterator"):
            jax.jit(lambda s: tuner.step(s, iter([here.train]), here.val))(
                tuner.init(here.params, here.hparams)
            )


class TestManyStarts:
    def starts(self, count=16):
        return {
            "log_l2": jnp.linspace(-2.0, 1.0, 2 * count).reshape(count, 2),
            "tilt": jnp.linspace(-1.0, 1.0, count),
        }

    @each_kind
    def test_sixteen_in_one_program(self, kind):
        here, starts = Counted(), self.starts()
        tuner = here.tuner(kind)
        together = jax.jit(jax.vmap(lambda h: here.run(tuner, 23, hparams=h)))(starts)
        assert here.traces <= 5
        assert together.history.outer_values.shape == together.history.steps.shape
        for k in (0, 7, 15):
            alone = here.run(tuner, 23, hparams=jax.tree.map(lambda x, k=k: x[k], starts))
            one = jax.tree.map(lambda x, k=k: x[k], together)
            same_history(one.history, alone.history)
            close(JAX, (one.params, one.hparams), (alone.params, alone.hparams))
            tuner.check(one.state, one.last)

    def test_one_that_meets_a_fault_stands_still_and_the_others_go_on(self):
        here, starts = Counted(), self.starts(4)
        train = lambda t: here.train | {"y": here.train["y"]}  # noqa: E731
        wrong = hg.Bilevel(
            lambda p, h, b: here.problem.inner(p, h, b) + 0.0 * jnp.log(1.0 - h["tilt"]), here.problem.outer
        )
        starts["tilt"] = jnp.asarray([0.0, 2.0, 0.1, -0.1])
        tuner = hg.Tuner(wrong, hg.Greedy(RULE), every=5)
        runs = jax.vmap(lambda h: tuner.run(here.params, h, train, here.val, 20))(starts)
        for k in range(4):
            one = jax.tree.map(lambda x, k=k: x[k], runs)
            if k == 1:
                assert float(one.hparams["tilt"]) == 2.0 and int(one.last.observed.bad_step) == 0
                with pytest.raises(errors.NonFiniteError):
                    tuner.check(one.state, one.last)
            else:
                tuner.check(one.state, one.last)
                assert np.isfinite(one.history.outer_values[1:]).all()
