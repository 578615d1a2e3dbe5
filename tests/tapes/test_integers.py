"""What `hg.Reversible` is made of: pools of 16 bits, digits of four, steps in blocks, and a digest."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.frameworks import NUMPY, each_backend, on_jax, with_a_generator

import hypergrad as hg
from hypergrad.backend.memory import BLOCKS, blocks
from hypergrad.tapes.reversible.fixedpoint import (
    DENOMINATOR,
    DIGIT,
    POOL,
    SPILLS,
    WORD,
    FixedPoint,
    Ratio,
    digits,
    is_full,
    pooled,
)
from hypergrad.tapes.reversible.integers import Integers, Steps
from hypergrad.tapes.reversible.log import EACH, Log

parametrize = pytest.mark.parametrize
BITS = [32, 64]


def form(backend, bits):
    return FixedPoint(backend, bits, {32: 24, 64: 48}[bits])


def whole(backend, values, bits):
    return backend.cast(backend.asarray(np.asarray(values, np.int64)), f"int{bits}")


class TestBits:
    @parametrize("momentum", [0.5, 0.9, 0.99])
    def test_log_and_pool_are_near_what_must_be_remembered(self, momentum):
        steps, ratio = 10_000, Ratio.of(NUMPY, momentum, "int32")
        words = -(-digits(ratio, steps) // EACH)
        assert (POOL + WORD * words) / (steps * math.log2(1 / momentum)) <= 1.1

    @given(st.integers(1, DENOMINATOR - 1), st.integers(2, DENOMINATOR), st.integers(1, 300))
    def test_a_pool_never_leaves_them(self, n, d, steps):
        n, d = (f := Fraction(min(n, d - 1), d)).numerator, f.denominator
        ratio, top = Ratio(n, d, 0.0), 0
        for _ in range(steps):
            spilled = 0
            while is_full(top, ratio):
                top, spilled = top >> DIGIT, spilled + 1
            top = pooled(top, ratio)
            assert top < 2**POOL and spilled <= SPILLS

    @each_backend
    @parametrize("bits", BITS)
    @parametrize("momentum", [1 / 1024, 0.3, 0.5, 0.77, 0.9, 0.99])
    def test_pools_and_velocities_come_back(self, backend, bits, momentum):
        of, ratio = form(backend, bits), Ratio.of(backend, momentum, f"int{bits}")
        rng, steps = np.random.default_rng(0), Steps(backend, of, ())
        b = whole(backend, rng.integers(-(2**30), 2**30, 50), bits)
        at = Integers([], [], [b], [of.empty(b)], steps.begin([], [])[0].top)
        log, top, counts, seen = Log.begin(backend, at, 40), 0, [], [b]
        for _ in range(20):
            before = int(log.count)
            at, log = log.take_in(backend, of, at, ratio)
            counts.append(int(log.count) - before)
            b, pool = of.shrink(at.velocity[0], at.pool[0], ratio)
            assert backend.describe(pool).dtype == "int16"
            at = at._replace(velocity=[b], pool=[pool], top=pooled(at.top, ratio))
            top = max(top, int(np.max(backend.to_numpy(pool))) + 2**15)
            seen.append(b)
        assert top < 2**POOL
        for count, then in zip(reversed(counts), reversed(seen[:-1]), strict=True):
            b, pool = of.grow(at.velocity[0], at.pool[0], ratio)
            at, log = log.give_back(backend, of, at._replace(velocity=[b], pool=[pool]), count)
            np.testing.assert_array_equal(backend.to_numpy(b), backend.to_numpy(then))
        np.testing.assert_array_equal(backend.to_numpy(at.pool[0]), -(2**15))

    @each_backend
    def test_digits_of_the_fullest_pool(self, backend):
        of = form(backend, 32)
        pool = backend.cast(whole(backend, np.arange(2**16) - 2**15, 32), "int16")
        digit, rest = of.digit(pool), of.spill(pool)
        assert backend.describe(digit).dtype == f"uint{WORD}"
        np.testing.assert_array_equal(backend.to_numpy(digit), np.arange(2**16) % 16)
        np.testing.assert_array_equal(backend.to_numpy(rest).astype(int) + 2**15, np.arange(2**16) // 16)
        np.testing.assert_array_equal(backend.to_numpy(of.refill(rest, digit)), backend.to_numpy(pool))

    @each_backend
    @parametrize("bits", BITS)
    def test_a_number_in_two_parts(self, backend, bits):
        of, edge = form(backend, bits), 2 ** (bits - 2)
        values = np.concatenate([np.arange(-300, 300) + k * (edge // 3) for k in range(-3, 4)])
        x = whole(backend, np.clip(values, -edge, edge), bits)
        near, rest = of.split(x, f"float{bits}")
        assert backend.describe(rest).dtype == f"int{bits // 4}"
        np.testing.assert_array_equal(backend.to_numpy(of.joined(near, rest)), backend.to_numpy(x))


class TestDigest:
    @each_backend
    @parametrize("bits", BITS)
    def test_sees_a_single_bit(self, backend, bits):
        steps = Steps(backend, form(backend, bits), (f"float{bits}",) * 2)
        rng = np.random.default_rng(0)
        like = backend.cast(backend.asarray(np.zeros(())), f"float{bits}")
        leaves = [backend.asarray(rng.normal(size=shape), like=like) for shape in ((5,), (3, 2))]
        at, _ = steps.begin(leaves, leaves)
        digest = steps.digest(at)
        assert bool(steps.agree(digest, steps.digest(at)))
        for k in range(2):
            for name in ("rest", "velocity"):
                parts = list(getattr(at, name))
                parts[k] = parts[k] + backend.cast(
                    leaves[k] == leaves[k][(0,) * len(leaves[k].shape)], "int8"
                )
                assert not bool(steps.agree(digest, steps.digest(at._replace(**{name: parts}))))


class TestBlocks:
    @with_a_generator
    @parametrize("shape", [(300, 400), (5, 50_000), (200_000,), (1, 200_000), (7,), ()])
    @parametrize("turned", [False, True])
    def test_are_the_same_as_the_whole(self, backend, shape, turned):
        rng = np.random.default_rng(0)
        x, y = (backend.asarray(np.asarray(rng.normal(size=shape))) for _ in range(2))
        if turned and len(shape) == 2:
            x, y = x.T, y.T
        total, number = backend.to_numpy(x + 2 * y), float((x * y).sum())
        (new,), (found,) = backend.memory.in_blocks(lambda x, y: ((x + 2 * y,), ((x * y).sum(),)), [x], [y])
        np.testing.assert_array_equal(backend.to_numpy(new), total)
        np.testing.assert_allclose(float(found), number, rtol=1e-12)

    def test_there_are_not_more_than_enough(self):
        assert [blocks(shape) for shape in ((), (10,), (2, 10**6), (10**8,))] == [1, 1, 2, BLOCKS]


@on_jax
class TestPrograms:
    @parametrize("turned", [False, True])
    @parametrize("shape", [(300, 400), (307, 400), (200_000,), (7,), ()])
    def test_blocks_are_the_same_as_the_whole(self, backend, shape, turned):
        TestBlocks().test_are_the_same_as_the_whole(backend, shape, turned)

    def test_need_few_copies_of_the_parameters(self, backend):
        import jax

        size, steps = 800, 300  # of a smaller leaf a block is a large share
        like = backend.cast(backend.asarray(np.zeros(())), "float32")
        w = backend.asarray(np.eye(size), like=like)
        problem = hg.Bilevel(
            lambda w, h, b: h * ((b @ w) ** 2).sum(), lambda w, h, b: ((b @ w - b) ** 2).sum()
        )
        train, h = backend.asarray(np.ones((2, size)), like=like), backend.asarray(0.5, like=like)
        estimator = hg.Unrolled(hg.SGD(1e-6, momentum=0.9), steps, tape=hg.Reversible())
        state = estimator.init(problem, w, h)

        def copies(**options):
            run = jax.jit(lambda s, h: estimator.estimate(problem, s, h, lambda t: train, train), **options)
            sizes = run.lower(state, h).compile().memory_analysis()
            most = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
            return (most - sizes.alias_size_in_bytes) / (4 * size**2)

        # θ, b, the pool and what comes back are 5.75, the result 2, and at times there is a gradient.
        log = WORD * -(-digits(Ratio.of(backend, 0.9, "int32"), steps) // EACH) / 32
        assert copies(donate_argnums=(0,)) <= log + 5.75 + 2 + 1.6
        assert copies() <= log + 5.75 + 4 + 1.6


class TestLetsGo:
    def test_of_what_came_back(self):
        # θ_T stays what it is though training goes back from there, and so do θ_0 and the slope of T2.
        backend = NUMPY
        problem = hg.Bilevel(lambda w, h, b: h * (w**2).sum(), lambda w, h, b: (w**2).sum())
        found = []
        for tape in (hg.States(), hg.Reversible()):
            estimator = hg.Unrolled(hg.SGD(0.1, momentum=0.5), 5, tape=tape)
            w = np.linspace(-1.0, 1.0, 70_000)
            state = estimator.init(problem, w, np.array(0.3))
            out = estimator.estimate(problem, state, np.array(0.3), lambda t: None, None, backend=backend)
            np.testing.assert_array_equal(w, np.linspace(-1.0, 1.0, 70_000))
            found.append((out.state.params, out.state.opt_state.velocity, out.hypergradient))
        for x, y in zip(*found, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)

    @with_a_generator
    @pytest.mark.parametrize("size", [5, 70_000])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_of_no_parameters_that_a_loss_has_kept(self, backend, size, dtype):
        kept = []

        def inner(w, h, b):
            at = backend.detach(w)
            kept.append((at, backend.to_numpy(at).copy()))
            return h * (w**2).sum()

        problem = hg.Bilevel(inner, lambda w, h, b: (w**2).sum())
        estimator = hg.Unrolled(hg.SGD(0.1, momentum=0.5), 4, tape=hg.Reversible())
        w, h = (
            backend.asarray(x.astype(dtype), like=None) for x in (np.linspace(-1.0, 1.0, size), np.array(0.3))
        )
        estimator.estimate(problem, estimator.init(problem, w, h), h, lambda t: None, None)
        there, back = kept[:4], kept[-4:]
        for (at, then), (_, again) in zip(there, reversed(back), strict=True):
            np.testing.assert_array_equal(then, again)
            np.testing.assert_array_equal(then, backend.to_numpy(at))
