"""Estimators, solvers, update rules and spaces are values, and refuse what makes no sense at once."""

import dataclasses

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import spaces
from hypergrad.backend import find_backend, get_backend
from hypergrad.errors import ArgumentError, BackendError, LeafTypeError

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
    "a negative damping": lambda: hg.Implicit(damping=-1.0),
    "no tolerance": lambda: hg.Implicit(tolerance=0.0),
    "an unknown policy": lambda: hg.Implicit(on_failure="ignore"),
    "no products": lambda: hg.CG(max_steps=0),
    "a tolerance of one": lambda: hg.CG(rtol=1.0),
    "a step backwards": lambda: hg.Neumann(step_size=-1.0),
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


def test_direct_refuses_what_would_not_fit():
    numpy, v = get_backend("numpy"), np.ones(20_000)
    with pytest.raises(ArgumentError, match=r"20000 unknowns .* 3\.0 GiB"):
        hg.solve(lambda p: p, v, hg.Direct(), backend=numpy)


class TestSpaces:
    INSIDE = {
        hg.Real(): [-2.0, 0.0, 3.0],
        hg.Positive(): [1e-8, 1.0, 50.0],
        hg.Positive("softplus"): [1e-8, 1.0, 50.0],
        hg.NonNegative(): [0.0, 1.0, 2.0],
        hg.Interval(-1.0, 3.0): [-0.99, 0.0, 2.9],
        hg.Simplex(): [0.2, 0.3, 0.5],
    }
    OUTSIDE = {
        hg.Real(): [np.nan, 0.0],
        hg.Positive(): [0.0, 1.0],
        hg.Positive("softplus"): [-1.0, 1.0],
        hg.NonNegative(): [-1e-9, 1.0],
        hg.Interval(0.0, 1.0): [0.0, 0.5],
        hg.Simplex(): [0.5, 0.6],
    }

    @pytest.mark.parametrize("space", INSIDE, ids=repr)
    def test_the_way_there_and_back(self, space, backend):
        values = np.array(self.INSIDE[space])
        free = spaces.unconstrain(backend, space, backend.asarray(values))
        np.testing.assert_allclose(
            backend.to_numpy(spaces.constrain(backend, space, free)), values, rtol=1e-12
        )

    @pytest.mark.parametrize("space", OUTSIDE, ids=repr)
    def test_one_starts_inside(self, space):
        with pytest.raises(ArgumentError, match=r"hparams\['a'\] lies outside"):
            spaces.unconstrain(get_backend("numpy"), {"a": space}, {"a": np.array(self.OUTSIDE[space])})

    @pytest.mark.parametrize(
        "space", [hg.Positive(), hg.Positive("softplus"), hg.Interval(0.0, 2.0), hg.Simplex()]
    )
    def test_no_coordinate_leads_out(self, space):
        with np.errstate(over="ignore"):
            values = space.constrain(get_backend("numpy").xp, np.array([-700.0, 0.0, 700.0]))
        assert np.all(np.isfinite(values)) and np.all(values >= 0)

    @pytest.mark.parametrize("space", [hg.Positive(), hg.Positive("softplus")], ids=repr)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_a_huge_step_leaves_a_positive_number(self, space, dtype, backend):
        far = backend.asarray(np.array([-1e6, 1.0, 1e6], dtype))
        free, moved = spaces.project(backend, space, far)
        values = backend.to_numpy(spaces.constrain(backend, space, free))
        assert (
            int(moved) == 2 and values.dtype == dtype and np.all(values > 0) and np.all(np.isfinite(values))
        )

    def test_projection_counts_what_it_moves(self):
        moved, count = spaces.project(get_backend("numpy"), hg.NonNegative(), np.array([-1.0, 2.0, -3.0]))
        assert moved.tolist() == [0.0, 2.0, 0.0] and count == 2

    @pytest.mark.parametrize("space", [{"b": hg.Real()}, {"a": "positive"}, [hg.Real()]])
    def test_a_tree_of_spaces_fits_the_hyperparameters(self, space):
        with pytest.raises(ArgumentError, match="space"):
            spaces.spread(get_backend("numpy"), space, {"a": np.ones(2)})

    def test_a_tree_of_spaces_stops_at_any_level(self):
        spread = spaces.spread(get_backend("numpy"), {"a": hg.Positive()}, {"a": [np.ones(2), np.ones(3)]})
        assert spread == {"a": [hg.Positive(), hg.Positive()]}


class TestFindingABackend:
    def test_by_name(self):
        assert find_backend(backend="numpy") is get_backend("numpy")
        with pytest.raises(BackendError, match="no backend 'abacus'"):
            get_backend("abacus")

    def test_by_value(self):
        assert find_backend(backend=get_backend("pebble")).name == "pebble"

    def test_from_arrays(self):
        pebble = get_backend("pebble").asarray(np.ones(2))
        assert find_backend({"x": pebble}).name == "pebble"
        with pytest.raises(LeafTypeError, match="numpy and pebble"):
            find_backend({"x": pebble}, {"y": np.ones(2)})
        with pytest.raises(LeafTypeError, match="builtins.str"):
            find_backend({"x": "text"})

    def test_a_framework_that_is_missing_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr("hypergrad.backend.find_spec", lambda name: None)
        with pytest.raises(BackendError, match="python -m pip install pebble-backend pebble"):
            get_backend.__wrapped__("pebble")
