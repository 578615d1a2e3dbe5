"""The frameworks that faults are tried on."""

import pytest
from support.frameworks import BACKENDS


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request):
    return request.param
