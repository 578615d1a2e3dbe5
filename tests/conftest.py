"""What all tests share: deterministic properties, and every backend that is registered and installed."""

import os
import signal
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings
from support.frameworks import is_affordable

from hypergrad.backend import available, get_backend

settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")


# A shell starts jobs in the background with Ctrl-C ignored, and Python then installs no handler for it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    found = yield
    return list(filter(is_affordable, found)) if isinstance(found, list) else found


if find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # the problems are tiny: threads would only wait for one another


if find_spec("jax"):
    import jax
    from support.quick_xla import FLAGS

    quick = f"{FLAGS} --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
    jax.config.update("jax_enable_x64", True)  # for these tests; the library never touches it


@pytest.fixture(params=[row.name for row in available() if row.installed])
def backend(request):
    return get_backend(request.param)
