"""Every law of backends catches something: NumPy's backend with one fault at a time."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from autograd.tracer import getval
from support.frameworks import NUMPY

import hypergrad as hg
from hypergrad.backend import vectors
from hypergrad.backend.loops import Loops
from hypergrad.backend.memory import Memory
from hypergrad.backend.random import Random
from hypergrad.backend.trees import Trees
from hypergrad.backend.types import Pullback, Push
from hypergrad.testing import BACKEND_LAWS

Sound = type(NUMPY)


def backend(**members):
    """NumPy's backend with other members."""
    return type("Broken", (Sound,), {"name": "broken", **members})()


def with_part(kind, part, **members):
    """NumPy's backend with other methods in one of its parts: trees, loops, random or memory."""
    sound = type(getattr(NUMPY, part))
    assert issubclass(sound, kind)
    return backend(**{part: property(lambda self: type("Part", (sound,), members)(self))})


def with_functions(**functions):
    """NumPy's backend with other functions in its namespace, or with none of a name, for ``None``."""
    xp = {name: f for name, f in (vars(NUMPY.xp) | functions).items() if f is not None}
    return backend(xp=SimpleNamespace(**xp))


# Arrays whose operators are wrong.


class Backwards(np.ndarray):
    """1 − x is x − 1."""

    def __rsub__(self, other):
        return self - other


class Counting(np.ndarray):
    """float(x) is a count of something."""

    def __float__(self):
        return 1.0


def of_class(kind):
    return backend(asarray=lambda self, values, like=None: Sound.asarray(self, values, like).view(kind))


# Derivatives with a fault.


class Wrapped(Pullback):
    """A pullback that ``change`` makes another; the rest is right unless a subclass says otherwise."""

    def __init__(self, pullback, change=lambda found, cotangent: found):
        self.pullback, self.change = pullback, change

    def __call__(self, cotangent):
        return self.change(self.pullback(cotangent), cotangent)

    @property
    def reached(self):
        return self.pullback.reached

    @property
    def nbytes(self):
        return self.pullback.nbytes


class WithPartsMixedUp(Wrapped):
    def onto(self, k):
        return lambda cotangent: self(cotangent)[0]


class ThatReachesByValues(Wrapped):
    @property
    def reached(self):
        return NUMPY.map(lambda g: bool(np.any(g)), self(np.array(1.0)))


class Once(Push):
    """It can be called a single time."""

    def __init__(self, push):
        self.push, self.called = push, False

    def __call__(self, *tangents):
        assert not self.called
        self.called = True
        return self.push(*tangents)

    @property
    def reached(self):
        return self.push.reached


class HalfAsFar(Once):
    def __call__(self, *tangents):
        return vectors.scale(NUMPY, 0.5, self.push(*tangents))


def with_pullbacks(make):
    def vjp(self, f, *primals):
        value, pullback, aux = Sound.vjp(self, f, *primals)
        return value, make(pullback), aux

    return backend(vjp=vjp)


def with_gradients(change):
    """Each part of a gradient is changed, by a function of part and cotangent."""

    def parts(found, cotangent):
        return tuple(change(part, cotangent) for part in found)

    return with_pullbacks(lambda pullback: Wrapped(pullback, parts))


def floats(change):
    return lambda tree: NUMPY.map(lambda x: change(x) if NUMPY.is_float(x) else x, tree)


def with_pushes(make):
    def linearize(self, f, *primals):
        value, push, aux = Sound.linearize(self, f, *primals)
        return value, make(push), aux

    return backend(linearize=linearize)


def detaching(self, f, *primals):
    """A gradient that nothing outside can be differentiated through."""
    value, pullback, aux = Sound.vjp(self, f, *self.detach(primals))
    return value, Wrapped(pullback, lambda found, _: Sound.detach(self, found)), aux


def symmetric_only(self, matvec, v, solve, solve_derivative, symmetric):
    return Sound.linear_solve(self, matvec, v, solve, solve_derivative, True)


# Parts with a fault.


def flatten_with_none(self, tree):
    leaves, unflatten = Trees.flatten(self, tree)
    return [*leaves, None], lambda leaves: unflatten(leaves[:-1])


def unravel_as_it_comes(self, tree):
    flat, unravel = Sound.ravel(self, tree)

    def wide(vector):
        return NUMPY.map(lambda x: x.astype(vector.dtype), unravel(vector))

    return flat, wide


def scan_forwards(self, body, carry, length, xs=None, reverse=False):
    return Loops.scan(self, body, carry, length, xs)


def repeat_too_long(self, body, carry, limit):
    return Loops.repeat(self, lambda c, k: (*body(c, k)[:3], k < 5), carry, limit)


def next_row(self, items, k, item):
    return Loops.set_row(self, items, (k + 1) % len(items), item)


def call_twice(self, listener, *values):
    listener(*values)
    listener(*values)


def normal_of_the_seed_alone(self, seed, count, shape, like):
    return Random.normal(self, seed, 0, shape, like)


@contextmanager
def replay_and_stay(self, state):
    self.restore(state)
    yield


def last_block(self, f, used, given):
    shape = used[0].shape
    if len(shape) < 2:
        return Memory.in_blocks(self, f, used, given)
    new, _ = Memory.in_blocks(self, f, used, given)
    half = shape[0] // 2
    return new, f(*(x[half:] for x in (*used, *given)))[1]


def half_precision(array):
    return array.astype("float16").astype(array.dtype)


BROKEN = {
    "is_a_backend": backend(__eq__=lambda self, other: self is other, __hash__=lambda self: id(self)),
    "values_come_back": backend(asarray=lambda self, values, like=None: np.asarray(values, float)),
    "foreign_objects_are_not_owned": backend(owns=lambda self, leaf: True),
    "dtypes_can_be_changed": backend(cast=lambda self, x, dtype: np.round(x).astype(dtype)),
    "arrays_have_operators": of_class(Backwards),
    "operators_have_derivatives": with_gradients(lambda part, _: floats(np.abs)(part)),
    "operators_keep_float32": with_functions(where=lambda c, x, y: np.where(c, x, y).astype(float)),
    "arrays_convert_to_python": of_class(Counting),
    "namespaces_are_complete": with_functions(tanh=None),
    "functions_do_what_their_names_say": with_functions(maximum=NUMPY.xp.minimum),
    "functions_have_derivatives": with_functions(tanh=lambda x: np.tanh(getval(x))),
    "flattening_round_trips": with_part(Trees, "trees", flatten=flatten_with_none),
    "forms_distinguish_trees": backend(
        form=lambda self, tree: str(NUMPY.map(lambda x: getattr(x, "shape", None), tree))
    ),
    "copies_are_independent": backend(copy=lambda self, tree: tree),
    "trees_are_vectors": backend(axpy=lambda self, a, x, y: Sound.axpy(self, a, y, x)),
    "vectors_give_leaves_their_dtype": backend(ravel=unravel_as_it_comes),
    "sums_keep_dtypes": backend(
        axpy=lambda self, a, x, y: NUMPY.map(lambda u, v: (a * u + v).astype(u.dtype), x, y)
    ),
    "scalars_are_numbers": backend(number=lambda self, scalar: np.float64(getval(scalar))),
    "gradients_are_derivatives": with_gradients(lambda part, _: floats(lambda x: 2.0 * x)(part)),
    "forward_is_reverse_transposed": with_pushes(HalfAsFar),
    "linearized_functions_push_forward": with_pushes(Once),
    "pullbacks_are_linear": with_gradients(lambda part, _: floats(lambda x: x + 1e-3)(part)),
    "pullbacks_have_parts": with_pullbacks(WithPartsMixedUp),
    "derivatives_nest": backend(vjp=detaching),
    "outer_derivatives_reach_inside": backend(vjp=detaching),
    "linear_solves_have_the_derivatives_of_the_inverse": backend(linear_solve=symmetric_only),
    "graphs_say_what_they_reach": with_pullbacks(ThatReachesByValues),
    "values_say_what_they_use": backend(
        uses=lambda self, f, *primals: tuple(NUMPY.map(lambda x: True, primal) for primal in primals)
    ),
    "detached_values_are_constant": backend(detach=lambda self, tree: tree),
    "integers_pass_through": with_gradients(lambda part, u: u if isinstance(u, dict) else part),
    "dtypes_are_kept": with_gradients(lambda part, _: floats(lambda x: x.astype(float))(part)),
    "missing_derivatives_raise": backend(nondifferentiable=lambda self, tree, what: tree),
    "loops_are_loops": with_part(Loops, "loops", scan=scan_forwards),
    "rows_are_collected": with_part(Loops, "loops", repeat=repeat_too_long),
    "rows_can_be_set": with_part(Loops, "loops", set_row=next_row),
    "callbacks_get_values": with_part(Loops, "loops", callback=call_twice),
    "normal_numbers_follow_from_seed_and_count": with_part(Random, "random", normal=normal_of_the_seed_alone),
    "randomness_replays": with_part(Random, "random", replay=replay_and_stay),
    "states_follow_from_seeds": with_part(
        Random, "random", state=lambda self, seed=None: np.random.get_state()
    ),
    "host_copies_round_trip": with_part(
        Memory, "memory", to_host=lambda self, tree: floats(half_precision)(tree)
    ),
    "blocks_give_the_same_result": with_part(Memory, "memory", in_blocks=last_block),
}
LAWS = {law.__name__: law for law in BACKEND_LAWS}


@pytest.fixture(autouse=True)
def the_same_generator_afterwards():
    before = np.random.get_state()
    yield
    np.random.set_state(before)


def test_every_law_has_one():
    assert BROKEN.keys() == LAWS.keys()


@pytest.mark.parametrize("name", LAWS)
def test_a_broken_one_is_caught(name):
    with pytest.raises((AssertionError, TypeError, hg.HypergradError)):
        LAWS[name](BROKEN[name])


@pytest.mark.parametrize("law", BACKEND_LAWS, ids=lambda law: law.__name__)
def test_without_a_fault_it_passes(law):
    """So that each is caught for its fault, and not for being no backend that is registered."""
    law(backend())
