"""What all tests share: deterministic properties, and every backend that is registered and installed."""

from importlib.util import find_spec

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

if find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # the problems are tiny: threads would only wait for one another


if find_spec("jax"):
    import jax

    jax.config.update("jax_enable_x64", True)  # for these tests; the library never touches it


@pytest.fixture(params=[row.name for row in available() if row.installed])
def backend(request):
    return get_backend(request.param)
