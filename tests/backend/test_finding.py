"""Finding a backend, by name or by the arrays."""

import sys
from types import ModuleType

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.backend import find_backend, get_backend, registry
from hypergrad.errors import BackendError, BackendWarning, LeafTypeError


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
        with pytest.raises(LeafTypeError, match="array of numpy and .* an array of pebble"):
            find_backend({"x": pebble}, {"y": np.ones(2)})
        with pytest.raises(LeafTypeError, match="builtins.str"):
            find_backend({"x": "text"})

    def test_a_framework_that_is_missing_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr("hypergrad.backend.registry.find_spec", lambda name: None)
        with pytest.raises(BackendError, match="python -m pip install pebble-backend pebble"):
            get_backend.__wrapped__("pebble")


class Broken:
    """The entry point of a package whose backend cannot be imported."""

    name, dist = "abacus", type("Distribution", (), {"name": "abacus-backend"})

    def load(self):
        raise ImportError("abacus.core has no member 'beads'")


class TestBrokenPlugin:
    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch):
        known = registry.registered()
        monkeypatch.setattr(registry, "registered", lambda: known | {"abacus": Broken()})
        monkeypatch.setattr(registry, "_registered_names", lambda: (*sorted(known), "abacus"))
        monkeypatch.setitem(sys.modules, "abacus", ModuleType("abacus"))
        registry._backend_or_none.cache_clear()
        yield
        registry._backend_or_none.cache_clear()

    def test_is_left_out_with_one_warning_that_names_it(self):
        def estimate():
            problem = hg.Bilevel(lambda w, h, b: (h * w**2).sum(), lambda w, h, b: (w**2).sum())
            return hg.hypergradient(problem, np.ones(2), np.array(0.1), None, None, hg.Greedy(hg.SGD(0.1)))

        with pytest.warns(BackendWarning, match="'abacus' of the package abacus-backend .* 'beads'") as said:
            assert np.isfinite(estimate())
            assert np.isfinite(estimate())
        assert len(said) == 1

    def test_is_an_error_if_it_is_asked_for(self):
        with pytest.raises(BackendError, match="abacus-backend cannot be loaded: ImportError"):
            get_backend("abacus")

    def test_is_listed(self):
        assert any(row.name == "abacus" and row.installed for row in hg.backend.available())
