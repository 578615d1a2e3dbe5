"""Estimators, solvers, update rules and spaces are values, and refuse what makes no sense at once."""

import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.backend import get_backend
from hypergrad.errors import ArgumentError

SGD = hg.SGD(0.1)
NONSENSE = {
    "a loss that is none": lambda: hg.Bilevel(inner=1, outer=sum),
    "a negative rate": lambda: hg.SGD(-1.0),
    "a momentum of one": lambda: hg.SGD(0.1, momentum=1.0),
    "nesterov without momentum": lambda: hg.SGD(0.1, nesterov=True),
    "a boolean rate": lambda: hg.Adam(lr=True),
    "beta above one": lambda: hg.AdamW(beta2=1.5),
    "a negative eps": lambda: hg.Adam(eps=-1e-8),
    "alpha of one": lambda: hg.RMSprop(alpha=1.0),
    "a negative decay": lambda: hg.RMSprop(weight_decay=-1.0),
    "an update that is none": lambda: hg.Greedy("sgd"),
    "an unknown response": lambda: hg.Greedy(SGD, response="both"),
    "no steps": lambda: hg.Unrolled(SGD, 0),
    "half a step": lambda: hg.Unrolled(SGD, 1.5),
    "no terms": lambda: hg.Unrolled(SGD, 3, truncate=0),
    "a tape that is none": lambda: hg.Unrolled(SGD, 3, tape="full"),
    "a solver that is none": lambda: hg.Implicit("cg"),
    "a negative damping": lambda: hg.Implicit(hg.Damped(hg.CG(), -1.0)),
    "no tolerance": lambda: hg.Implicit(hg.CG(), checks=hg.Checks(tolerance=0.0)),
    "an unknown policy": lambda: hg.Implicit(hg.CG(), checks=hg.Checks(unsolved="later")),
    "no products": lambda: hg.CG(max_steps=0),
    "a tolerance of one": lambda: hg.CG(rtol=1.0),
    "a step backwards": lambda: hg.Neumann(step_size=-1.0),
    "no curvature outside of the rank": lambda: hg.Nystrom(3, damping=0.0),
    "a smallest damping above the first": lambda: hg.LevenbergMarquardt(hg.CG(), initial=0.1, smallest=1.0),
    "a damping that never grows": lambda: hg.LevenbergMarquardt(hg.CG(), factor=1.0),
    "an empty interval": lambda: hg.Interval(1.0, 1.0),
    "an infinite interval": lambda: hg.Interval(0.0, float("inf")),
    "an unknown link": lambda: hg.Positive("square"),
}


@pytest.mark.parametrize("build", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused(build):
    with pytest.raises(ArgumentError) as caught:
        build()
    assert isinstance(caught.value, ValueError | hg.HypergradError)


@pytest.mark.parametrize(
    "value",
    [hg.Greedy(SGD), hg.Unrolled(SGD, 3), hg.Implicit(), hg.CG(), hg.States(), hg.Positive(), SGD],
    ids=repr,
)
def test_values_are_frozen_comparable_and_printable(value):
    assert value == dataclasses.replace(value) and type(value).__name__ in repr(value)
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


def test_no_value_can_be_changed():
    """Only what counts or collects during a run may be written to."""
    written = {"Online", "_Host"}
    names = [name for _, name, _ in pkgutil.walk_packages(hg.__path__, "hypergrad.")]
    classes = {
        value
        for module in map(importlib.import_module, names)
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    }
    assert len(classes) > 40
    assert {each.__name__ for each in classes if not each.__dataclass_params__.frozen} == written


MADE = [
    hg.Unrolled(SGD, 3, truncate=2), hg.Forward(SGD, 3),
    hg.CG(), hg.MINRES(), hg.GMRES(), hg.BiCGStab(), hg.Neumann(), hg.Direct(), hg.Amortised(0.1),
    hg.External(max), hg.Identity(), hg.Diagonal(3), hg.Nystrom(3),
    hg.Damped(hg.CG(), 1e-3), hg.LevenbergMarquardt(hg.CG()), hg.UntilAccurate(hg.CG(), 1e-2),
    hg.Binomial(slots=3), hg.Binomial(max_bytes=100), hg.Reversible(),
    hg.Adagrad(), hg.ClipNorm(SGD, 1.0), hg.FiniteDifference(), hg.Checks(),
    hg.Interval(-2.0, 1.0), hg.Tuner(hg.Bilevel(max, max), hg.Greedy(SGD)),
]  # fmt: skip
NO_COUNT, NO_NUMBER = (-1, 0, 1.5, True, "3"), (float("nan"), "x", True)
MAY_BE_ZERO = {"seed"}


@pytest.mark.parametrize("value", MADE, ids=lambda value: type(value).__name__)
def test_each_count_and_each_number_is_checked(value):
    for field in dataclasses.fields(value):
        kind = field.type.removesuffix(" | None")
        for wrong in {"int": NO_COUNT, "float": NO_NUMBER}.get(kind, ()):
            if wrong == 0 and field.name in MAY_BE_ZERO:
                continue
            with pytest.raises(ArgumentError):
                dataclasses.replace(value, **{field.name: wrong})
                pytest.fail(f"{field.name} = {wrong!r} is taken")


def test_direct_refuses_what_would_not_fit():
    numpy, v = get_backend("numpy"), np.ones(20_000)
    with pytest.raises(ArgumentError, match=r"20000 unknowns .* 3\.0 GiB"):
        hg.solve(lambda p: p, v, hg.Direct(), backend=numpy)
