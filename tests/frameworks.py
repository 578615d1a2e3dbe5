"""The frameworks that the suites of properties and of faults run on: those of the list that are installed."""

import pytest

from hypergrad.backend import available, get_backend

FRAMEWORKS = ["numpy", "torch"]

_installed = {row.name for row in available() if row.installed}
BACKENDS = {name: get_backend(name) for name in FRAMEWORKS if name in _installed}
NUMPY = BACKENDS["numpy"]


def each(*names):
    """Run a test with the argument ``backend`` on the frameworks named that are installed."""
    found = [name for name in names if name in BACKENDS]
    return pytest.mark.parametrize("backend", [BACKENDS[name] for name in found], ids=found)


each_backend = each(*FRAMEWORKS)
beside_numpy = each(*FRAMEWORKS[1:])
on_torch = each("torch")
