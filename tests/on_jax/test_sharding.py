"""JAX on a mesh of devices: the estimates are those of one device, and no weight is gathered on the way.

JAX is told how many devices it has before it starts, so all cases run in one process of their own, this file
as a program, which prints what it saw; the tests look at that.
"""

import json
import math
import os
import re
import subprocess
import sys
import traceback
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest

import hypergrad as hg

jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
from support import quick_xla  # noqa: E402

jnp, tree, P = jax.numpy, jax.tree_util, jax.sharding.PartitionSpec
pytestmark = pytest.mark.alone

DEVICES = {
    # What lays a program out over the devices is the same where compilation is quick.
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {quick_xla.FLAGS}",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "1",
    "PYTHONPATH": os.pathsep.join(sys.path),
}
MOMENTUM = hg.SGD(0.05, momentum=0.9)
ESTIMATORS = {
    "greedy": hg.Greedy(hg.SGD(0.1)),
    "greedy-gradient-adam": hg.Greedy(hg.Adam(0.1), response="gradient"),
    "unrolled-full": hg.Unrolled(MOMENTUM, 3),
    "unrolled-states": hg.Unrolled(MOMENTUM, 3, tape=hg.States()),
    "unrolled-optax": hg.Unrolled(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)), 3),
    "implicit-cg": hg.Implicit(hg.Damped(hg.CG(rtol=1e-13), 2.0), checks=hg.Checks(tolerance=float("inf"))),
}


class Layout(NamedTuple):
    """Where the devices hold the weights and the rows of a batch, and whether each weight has a strength.

    JAX finds the layout of what is computed by itself, or, on an ``explicit`` mesh, from the types.
    """

    mesh: dict[str, int]
    weights: dict[str, Any]
    rows: Any
    strengths: bool = False
    explicit: bool = False

    def make_mesh(self):
        kind = jax.sharding.AxisType.Explicit if self.explicit else jax.sharding.AxisType.Auto
        return jax.make_mesh(tuple(self.mesh.values()), tuple(self.mesh), (kind,) * len(self.mesh))


WHOLE = {"in": P(), "out": P()}
SPLIT = {"in": P(None, "model"), "out": P("model", None)}
SQUARE = {"data": 2, "model": 2}
LAYOUTS = {
    "batch": Layout({"data": 4}, WHOLE, P("data")),
    "weights": Layout({"model": 4}, SPLIT, P()),
    "both": Layout(SQUARE, SPLIT, P("data")),
    "both-and-a-strength-per-weight": Layout(SQUARE, SPLIT, P("data"), strengths=True),
    "both-on-an-explicit-mesh": Layout(SQUARE, SPLIT, P("data"), explicit=True),
}
ALL = LAYOUTS["both-and-a-strength-per-weight"]
CASES = [
    (estimator, layout)
    for estimator in ESTIMATORS
    for layout in LAYOUTS
    if not LAYOUTS[layout].explicit or estimator in ("greedy", "unrolled-states", "implicit-cg")
]


def make_problem(explicit=False, replicate=None):
    """Regression by a net of two layers; ``replicate`` is a layout that T1 asks of the first weight."""
    wide, narrow = (P("data", "model"), P("data", None)) if explicit else (None, None)

    def outer(params, log_l2, batch):
        hidden = jnp.tanh(jnp.einsum("ni,ij->nj", batch["x"], params["in"], out_sharding=wide))
        found = jnp.einsum("nj,jk->nk", hidden, params["out"], out_sharding=narrow)
        return jnp.mean((found - batch["y"]) ** 2)

    def inner(params, log_l2, batch):
        strengths = log_l2 if isinstance(log_l2, dict) else dict.fromkeys(params, log_l2)
        if replicate is not None:
            params = params | {"in": jax.lax.with_sharding_constraint(params["in"], replicate)}
        penalty = sum(jnp.sum(jnp.exp(strengths[name]) * w**2) for name, w in params.items())
        return outer(params, log_l2, batch) + penalty

    return hg.Bilevel(inner, outer)


def make_data(strengths):
    """Parameters, hyperparameters, T1 and T2 batch; no other array has as many numbers as a weight."""
    rng = np.random.default_rng(0)
    params = {name: 0.4 * rng.normal(size=shape) for name, shape in (("in", (5, 16)), ("out", (16, 3)))}
    log_l2 = {name: 0.3 * rng.normal(size=w.shape) - 1.0 for name, w in params.items()}
    batches = ({"x": rng.normal(size=(28, 5)), "y": rng.normal(size=(28, 3))} for _ in range(2))
    return params, log_l2 if strengths else np.array(-1.0), *batches


def on_one_device(layout):
    return tree.tree_map(jnp.asarray, make_data(layout.strengths))


def on_the_mesh(layout, mesh):
    rows = {"x": layout.rows, "y": layout.rows}
    specs = layout.weights, layout.weights if layout.strengths else P(), rows, rows
    put = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
    return tree.tree_map(put, make_data(layout.strengths), specs)


def distance(mine, other):
    """The largest relative difference of a leaf."""
    pairs = zip(tree.tree_leaves(mine), tree.tree_leaves(other), strict=True)
    norm = np.linalg.norm
    return max(float(norm(np.asarray(a) - np.asarray(b)) / norm(np.asarray(b))) for a, b in pairs)


def astray(found, params):
    """The leaves that have the shape of a parameter and lie elsewhere."""
    home = {w.shape: w.sharding for w in params.values()}
    return [
        f"{tree.keystr(path)} is {x.sharding}, not {home[x.shape]}"
        for path, x in tree.tree_leaves_with_path(found)
        if np.shape(x) in home and not x.sharding.is_equivalent_to(home[x.shape], x.ndim)
    ]


EXCHANGE = re.compile(r"= (?P<result>.*?) (?P<op>(?:all-(?:gather|reduce|to-all)|collective)[-\w]*)\(")


def gathered(hlo, params):
    """The exchanges between devices whose result is as large as the whole of a sharded parameter.

    By its size, since a gather may come transposed, flattened, or as a sum of pieces padded with zeros.
    """
    sizes = {w.size for w in params.values() if not w.sharding.is_fully_replicated}
    found = EXCHANGE.finditer(hlo)
    shapes = [(m, dims) for m in found for dims in re.findall(r"\w\[([\d,]+)\]", m["result"])]
    return [f"{m['op']}: [{dims}]" for m, dims in shapes if math.prod(map(int, dims.split(","))) in sizes]


def compiled(problem, estimator, args):
    params, hparams, train, val = args
    state = estimator.init(problem, params, hparams)
    run = lambda s, h, t, v: estimator.estimate(problem, s, h, lambda _: t, v)  # noqa: E731
    program = jax.jit(run).lower(state, hparams, train, val).compile()
    return state, program(state, hparams, train, val), program.as_text()


def answer(out):
    return out.hypergradient, out.state.params


# The program. Each of these runs a case and returns what the tests look at.


def run_compiled(estimator, layout, one):
    mesh = layout.make_mesh()
    args = on_the_mesh(layout, mesh)
    with jax.set_mesh(mesh) if layout.explicit else nullcontext():
        state, out, hlo = compiled(make_problem(layout.explicit), estimator, args)
        estimator.check(out)
    return {
        "distance": distance(answer(out), answer(one)),
        "astray": astray((state, out.state, out.hypergradient), args[0]),
        "gathered": gathered(hlo, args[0]),
    }


def run_eager(estimator, layout, one):
    args, problem = on_the_mesh(layout, layout.make_mesh()), make_problem()
    params, hparams, train, val = args
    state = estimator.init(problem, params, hparams)
    out = estimator.check(estimator.estimate(problem, state, hparams, lambda _: train, val))
    return {
        "distance": distance(answer(out), answer(one)),
        "astray": astray((out.state, out.hypergradient), params),
    }


def by_steps(tuner, params, hparams, train, val):
    state = tuner.init(params, hparams)
    for _ in range(4):
        state, _ = tuner.step(state, train, val)
    return state


def by_run(tuner, params, hparams, train, val):
    return tuner.run(params, hparams, train, val, steps=4).state


DRIVES = [by_steps, by_run]


def run_tuner(drive, layout):
    tuner, mesh = hg.Tuner(make_problem(), hg.Greedy(MOMENTUM), every=2), layout.make_mesh()
    args, results = on_the_mesh(layout, mesh), []
    for given in (args, on_one_device(layout)):
        state = drive(tuner, *given)
        results.append((tuner.hparams(state), state.inner, state.hyper_state))
    return {
        "distance": distance(*results),
        "moved": distance(results[0][0], args[1]),
        "astray": astray(results[0], args[0]),
    }


def run_gathering(layout):
    mesh = layout.make_mesh()
    problem = make_problem(replicate=jax.sharding.NamedSharding(mesh, P()))
    args = on_the_mesh(layout, mesh)
    return {"gathered": gathered(compiled(problem, ESTIMATORS["greedy"], args)[2], args[0])}


def attempt(run, *args):
    try:
        return run(*args)
    except Exception:
        return {"error": traceback.format_exc()}


def program():
    assert len(jax.devices()) == 4
    results = {"gathering": attempt(run_gathering, LAYOUTS["both"])}
    results |= {f"tuner/{drive.__name__}": attempt(run_tuner, drive, ALL) for drive in DRIVES}
    for name, estimator in ESTIMATORS.items():
        one, ones = (
            compiled(make_problem(), estimator, on_one_device(layout))[1] for layout in (LAYOUTS["both"], ALL)
        )
        for where in (where for case, where in CASES if case == name):
            layout = LAYOUTS[where]
            expected = ones if layout.strengths else one
            results[f"{name}/{where}"] = attempt(run_compiled, estimator, layout, expected)
        results[f"{name}/eager"] = attempt(run_eager, estimator, ALL, ones)
    return results


# The tests.


@pytest.fixture(scope="module")
def seen():
    """What the program saw of a case, by its name."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=os.environ | DEVICES
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)

    def of(*names):
        case = results["/".join(names)]
        assert "error" not in case, case["error"]
        return case

    return of


@pytest.mark.parametrize("estimator, layout", CASES)
class TestCompiled:
    def test_equal_those_of_one_device(self, seen, estimator, layout):
        assert seen(estimator, layout)["distance"] <= 1e-12

    def test_parameters_their_state_and_their_hypergradients_stay_where_they_lie(
        self, seen, estimator, layout
    ):
        assert seen(estimator, layout)["astray"] == []

    def test_no_sharded_parameter_is_gathered(self, seen, estimator, layout):
        assert seen(estimator, layout)["gathered"] == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestEager:
    def test_equal_those_of_one_device(self, seen, estimator):
        assert seen(estimator, "eager")["distance"] <= 1e-12

    def test_parameters_and_their_hypergradients_stay_where_they_lie(self, seen, estimator):
        assert seen(estimator, "eager")["astray"] == []


@pytest.mark.parametrize("drive", DRIVES)
class TestTuner:
    def test_trains_and_tunes_as_on_one_device(self, seen, drive):
        found = seen("tuner", drive.__name__)
        assert found["distance"] <= 1e-12 < found["moved"]

    def test_leaves_everything_where_it_lies(self, seen, drive):
        assert seen("tuner", drive.__name__)["astray"] == []


def test_a_gather_that_a_loss_asks_for_is_seen(seen):
    assert any(line.startswith("all-gather") for line in seen("gathering")["gathered"])


if __name__ == "__main__":
    json.dump(program(), sys.stdout)
