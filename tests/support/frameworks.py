"""The frameworks that the suites of properties and of faults run on: those of the list that are installed.

JAX compiles whatever it runs, and a loop outside of a program each time anew. So it is asked for fewer
examples and thinner grids, and half of its estimates are compiled as a whole, which is how JAX is used.
"""

from collections.abc import Iterator

import pytest

from hypergrad.backend import available, get_backend

FRAMEWORKS = ["numpy", "torch", "jax"]
COMPILED = {"jax"}

_installed = {row.name for row in available() if row.installed}
BACKENDS = {name: get_backend(name) for name in FRAMEWORKS if name in _installed}
NUMPY = BACKENDS["numpy"]


def each(*names):
    """Run a test with the argument ``backend`` on the frameworks named that are installed."""
    found = [name for name in names if name in BACKENDS]
    return pytest.mark.parametrize("backend", [BACKENDS[name] for name in found], ids=found)


each_backend = each(*FRAMEWORKS)
beside_numpy = each(*FRAMEWORKS[1:])
with_a_generator = each("numpy", "torch")
on_torch = each("torch")
on_jax = each("jax")


def affordable(backend, many, few):
    """How much of something to ask a framework for."""
    return few if backend.name in COMPILED else many


def dear(*values):
    """Values of a parameter that only cheap frameworks are tested with: see `is_affordable`."""
    return pytest.param(*values, marks=pytest.mark.dear)


def is_affordable(item):
    """Is a test to be run on its framework? For conftest, which leaves out the others."""
    return not item.get_closest_marker("dear") or affordable(item.callspec.params["backend"], True, False)


def program(backend, f):
    """A function of trees of arrays, as one program on a framework that compiles."""
    if backend.name not in COMPILED:
        return f
    import jax

    return jax.jit(f)


def estimate(backend, estimator, problem, state, hparams, *, compiled, **batches):
    """An estimate, eager or compiled: then faults in values come in the report, and `check` raises them."""
    if not compiled or backend.name not in COMPILED:
        return estimator.estimate(problem, state, hparams, **batches)
    called = {name: b for name, b in batches.items() if callable(b) or isinstance(b, Iterator)}
    data = {name: b for name, b in batches.items() if name not in called}

    def of_arrays(state, hparams, data):
        return estimator.estimate(problem, state, hparams, **data, **called)

    return estimator.check(program(backend, of_arrays)(state, hparams, data))
