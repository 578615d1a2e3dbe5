"""Finding a backend, by name or by the arrays."""

import numpy as np
import pytest

from hypergrad.backend import find_backend, get_backend
from hypergrad.errors import BackendError, LeafTypeError


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
        monkeypatch.setattr("hypergrad.backend.registry.find_spec", lambda name: None)
        with pytest.raises(BackendError, match="python -m pip install pebble-backend pebble"):
            get_backend.__wrapped__("pebble")
