"""What all tests share: deterministic properties, and every backend that is registered and installed."""

import pytest
from hypothesis import HealthCheck, settings

from hypergrad.backend import available, get_backend

settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")


@pytest.fixture(params=[row.name for row in available() if row.installed])
def backend(request):
    return get_backend(request.param)
