"""SIGTERM while a compiled run is under way: it saves after the stretch, and can go on from there."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import hypergrad as hg

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
import hypergrad as hg

jax.config.update("jax_enable_x64", True)
x, y = np.random.default_rng(3).normal(size=(8, 3)), np.random.default_rng(4).normal(size=8)
batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

def mse(w, b):
    return jnp.mean((b["x"] @ w - b["y"]) ** 2)

problem = hg.Bilevel(lambda w, h, b: mse(w, b) + jnp.exp(h) * jnp.sum(w**2), lambda w, h, b: mse(w, b))
tuner = hg.Tuner(problem, hg.Greedy(hg.SGD(0.05, 0.9)), every=3)
given = jnp.zeros(3), jnp.asarray(-2.0)

def run(steps, **options):
    return tuner.run(*given, [batch], [batch], steps, progress=False, **options)

if __name__ == "__main__":
    run(300)
    print("running", flush=True)
    run(30_000_000, save_to=sys.argv[1], save_every=300)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals of POSIX")
def test_a_compiled_run_saves_before_sigterm_ends_it(tmp_path):
    program, path, space = tmp_path / "program.py", tmp_path / "run.npz", {}
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, program, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "running\n"
        while not path.exists():
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == -signal.SIGTERM
    exec(PROGRAM, space)  # the same losses
    tuner, given, run = space["tuner"], space["given"], space["run"]
    resume = tuner.load(path, *given)
    done = len(resume[1].inner_values)
    assert done % 300 == 0 and done > 0
    resumed = run(done + 300, resume=resume).history
    whole = run(done + 300, save_to=tmp_path / "whole.npz", save_every=300).history  # the same programs
    for name, column in whole.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], column)
    assert isinstance(resumed, hg.tuning.History)
