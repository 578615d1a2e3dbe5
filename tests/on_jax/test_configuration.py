"""JAX without x64, in a process of its own, and its settings."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose
from support.jax_functions import FUNCTIONS, regression
from support.reality import BATCH, EACH, ESTIMATORS, HPARAMS, PARAMS, TRAINED, VAL, eager, fit, program

import hypergrad as hg

jax = pytest.importorskip("jax")
jnp, tree = jax.numpy, jax.tree_util
parametrize = pytest.mark.parametrize


def single_precision(trained):
    """Estimates in float32, from a process without x64; `Implicit` begins at the parameters given."""
    before = dict(jax.config.values)
    trained = {"w": np.array(trained["w"])}
    params, trained, hparams, batch, val = tree.tree_map(jnp.float32, (PARAMS, trained, HPARAMS, BATCH, VAL))
    problem, found, dtypes = fit(FUNCTIONS["custom_vjp"]), {}, set()
    for name, estimator in EACH.items():
        if name == "implicit":
            estimator, params = hg.Implicit(hg.CG(rtol=1e-5)), trained
        run = eager(estimator, problem)
        ways = {"jit": program(run, static_argnums=2)} | ({"eager": run} if name == "greedy" else {})
        for way, call in ways.items():
            out = estimator.check(call(params, hparams, lambda t: batch, val))
            seen = out.hypergradient, out.state.params, out.inner_value, out.outer_value
            dtypes |= {str(x.dtype) for x in tree.tree_leaves(seen)}
            found[f"{name}-{way}"] = {k: float(x) for k, x in out.hypergradient.items()}
    after = dict(jax.config.values)
    changed = [k for k in before | after if before.get(k) != after.get(k)]
    return {"found": found, "dtypes": sorted(dtypes), "changed": changed}


@pytest.fixture(scope="module")
def single():
    """What a process without x64 found."""
    trained = {"w": regression("custom_vjp").after(TRAINED)[1]["w"].tolist()}
    env = os.environ | {"JAX_ENABLE_X64": "0", "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", __file__, json.dumps(trained)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestConfiguration:
    def test_without_x64_everything_is_float32(self, single):
        assert single["dtypes"] == ["float32"]

    def test_no_setting_of_jax_is_changed(self, single):
        assert single["changed"] == []

    @parametrize("way", ["greedy-eager", *(f"{name}-jit" for name in ESTIMATORS)])
    def test_float32_gives_what_float64_gives(self, single, way):
        expected = regression("custom_vjp").estimate(way.partition("-")[0]).hypergradient
        found = single["found"][way]
        assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-3)


if __name__ == "__main__":
    json.dump(single_precision(json.loads(sys.argv[1])), sys.stdout)
