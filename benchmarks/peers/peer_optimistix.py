"""Optimistix: minimisers with an adjoint as an argument, implicit by Lineax, or by checkpoints."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx

from benchmarks.peers.frameworks import MOST, RTOL, Entry, Task
from benchmarks.peers.workloads import RATE


def entries(task: Task) -> list[Entry]:
    return implicit(task) if task.workload.implicit else unrolled(task)


def unrolled(task: Task) -> list[Entry]:
    steps = task.workload.steps

    def entry(setting, checkpoints) -> Entry:
        optimiser = optax.sgd(RATE, momentum=task.workload.momentum or None)
        solver = optx.OptaxMinimiser(optimiser, rtol=0.0, atol=0.0)
        adjoint = optx.RecursiveCheckpointAdjoint(checkpoints)

        def estimate(params, hparams, train, val):
            def final(lam):
                found = optx.minimise(
                    lambda theta, args: task.inner(theta, *args), solver, params, args=(lam, train),
                    max_steps=steps, adjoint=adjoint, throw=False,
                )  # fmt: skip
                return task.outer(found.value, lam, val)

            return jax.grad(final)(hparams)

        return Entry("optimistix", setting, estimate)

    found = [entry("RecursiveCheckpointAdjoint", None)]
    return [*found, entry(f"  with {steps} checkpoints", steps)] if steps > 1 else found


class Given(optx.AbstractMinimiser):
    """No step at all: the optimum is given, as it is to all; what remains is the derivative."""

    rtol: float = 0.0
    atol: float = 0.0
    norm: Callable = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return jnp.array(True)

    def step(self, fn, y, args, options, state, tags):
        return y, state, None

    def terminate(self, fn, y, args, options, state, tags):
        return state, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def implicit(task: Task) -> list[Entry]:
    definite = frozenset({lx.positive_semidefinite_tag})

    def entry(setting, solver, tags) -> Entry:
        adjoint = optx.ImplicitAdjoint(solver) if solver is not None else optx.ImplicitAdjoint()

        def estimate(params, hparams, train, val):
            def final(lam):
                found = optx.minimise(
                    lambda theta, args: task.inner(theta, *args), Given(), params, args=(lam, train),
                    adjoint=adjoint, tags=tags, throw=False,
                )  # fmt: skip
                return task.outer(found.value, lam, val)

            return jax.grad(final)(hparams)

        return Entry("optimistix", setting, estimate)

    cg = lx.CG(rtol=RTOL, atol=1e-12, max_steps=MOST)
    return [
        entry("ImplicitAdjoint, default", None, frozenset()),
        entry("  with the definite tag", None, definite),
        entry("  with lx.CG(rtol=1e-6)", cg, definite),
    ]
