"""What importing the library costs, and what it leaves alone."""

import subprocess
import sys

import hypergrad as hg

PROGRAM = """
import sys, time
begin = time.perf_counter()
import hypergrad
print(time.perf_counter() - begin)
foreign = {"torch", "jax", "autograd", "sklearn", "matplotlib", "rich", "scipy"} & set(sys.modules)
sys.exit(f"import hypergrad imported {foreign}" if foreign else 0)
"""


def seconds():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_it_imports_no_framework_and_is_quick():
    assert min(seconds() for _ in range(5)) < 0.3


def test_every_public_name_is_there():
    assert all(hasattr(hg, name) for name in hg.__all__) and len(set(hg.__all__)) == len(hg.__all__)
