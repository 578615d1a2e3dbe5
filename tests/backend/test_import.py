"""What importing the library costs, and what it leaves alone."""

import os
import subprocess
import sys

import pytest

import hypergrad as hg

pytestmark = pytest.mark.alone
PROGRAM = """
import sys, time
begin = time.perf_counter()
import hypergrad
print(time.perf_counter() - begin)
foreign = {"torch", "jax", "autograd", "sklearn", "matplotlib", "rich", "scipy"} & set(sys.modules)
sys.exit(f"import hypergrad imported {foreign}" if foreign else 0)
"""


def seconds(compiled):
    """The time of an import whose compiled files lie in a folder, as those of an installed library do."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=env | {"PYTHONPYCACHEPREFIX": str(compiled)},
    )
    return float(done.stdout)


def test_it_imports_no_framework_and_is_quick(tmp_path):
    assert min(seconds(tmp_path) for _ in range(5)) < 0.3


def test_every_public_name_is_there():
    assert all(hasattr(hg, name) for name in hg.__all__) and len(set(hg.__all__)) == len(hg.__all__)
